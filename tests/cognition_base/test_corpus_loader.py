"""The corpus loader: what is right is read, and what is wrong is named by file, entry and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cognition_base.corpus import FIELDS, Entry, corpus_digest, load_corpus, parse_paper
from common.errors import UsageError

GOOD = {name: f"text of {name}" for name in FIELDS}


def write(folder: Path, content: Any, name: str = "2406_06484.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_entries_come_in_the_order_of_file_names(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], "2406_00002.json")
    write(tmp_path, [GOOD, GOOD | {"BACKGROUND": "other"}], "2406_00001.json")
    write(tmp_path, "not a paper", ".hidden.json")
    write(tmp_path, "not a paper", "notes.txt")
    entries = load_corpus(tmp_path)
    assert [entry.id for entry in entries] == ["2406_00001_1", "2406_00001_2", "2406_00002_1"]
    assert entries[1].texts() == GOOD | {"BACKGROUND": "other"}
    assert entries[0].paper_key == "2406_00001"


def test_the_instructions_are_optional(tmp_path: Path) -> None:
    write(tmp_path, [{name: text for name, text in GOOD.items() if name != "DESIGN_AI_INSTRUCTIONS"}])
    assert load_corpus(tmp_path)[0].texts()["DESIGN_AI_INSTRUCTIONS"] == ""


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    write(tmp_path, [GOOD])
    before = corpus_digest(load_corpus(tmp_path))
    assert before == corpus_digest(load_corpus(tmp_path))
    write(tmp_path, [GOOD | {"BACKGROUND": "another"}])
    assert corpus_digest(load_corpus(tmp_path)) != before


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "JSON"),
        ("[1, 2", "JSON"),
        ("[" * 100_000, "JSON"),
        ({}, "a list of 1 to 3 entries"),
        ([], "0 entries"),
        ([GOOD] * 4, "4 entries"),
        (["text"], "entry 1"),
        ([GOOD, {}], "entry 2, DESIGN_INSIGHT"),
        ([GOOD | {"BACKGROUND": 3}], "entry 1, BACKGROUND"),
        ([GOOD | {"BACKGROUND": " \n"}], "entry 1, BACKGROUND"),
        ([GOOD | {"ALGORITHMIC_INNOVATION": "x" * 20_001}], "entry 1, ALGORITHMIC_INNOVATION"),
        ([GOOD | {"DESIGN_INSIGHT": "\ud800"}], "entry 1, DESIGN_INSIGHT"),
        ([GOOD | {"design_insight": "x"}], "'design_insight'"),
        ('[{"BACKGROUND": "a", "BACKGROUND": "b"}]', "'BACKGROUND' is there twice"),
        ('["' + "x" * (1 << 20) + '"]', "bytes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: Any, named: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UsageError) as caught:
        load_corpus(tmp_path)
    assert named in caught.value.message and str(path) in caught.value.message


def test_bytes_that_are_no_utf8_a_bad_name_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none"):
        load_corpus(tmp_path)
    with pytest.raises(UsageError):
        load_corpus(tmp_path / "nowhere")
    (tmp_path / "2406_1.json").write_bytes(b'["\xff"]')
    with pytest.raises(UsageError, match="UTF-8"):
        load_corpus(tmp_path)
    write(tmp_path, [GOOD], "2406.1 x.json")
    with pytest.raises(UsageError, match="name"):
        parse_paper(tmp_path / "2406.1 x.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values)
def test_any_json_is_entries_or_a_usage_error(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path, value)
    try:
        entries = parse_paper(path)
    except UsageError as error:
        assert str(path) in error.message
    else:
        assert 1 <= len(entries) <= 3 and all(isinstance(entry, Entry) for entry in entries)
