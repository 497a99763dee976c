"""Prompt templates: declared variables are those used, values pass through untouched, mistakes are named."""

from __future__ import annotations

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from common.errors import UsageError
from pipeline import prompts


@pytest.mark.parametrize("name", prompts.names())
def test_every_template_declares_documents_and_uses_its_variables(name: str) -> None:
    template = prompts.load(name)
    assert len(template.purpose) > 20 and all(len(text) > 10 for text in template.variables.values())
    marks = {variable: f"<<{variable}>>" for variable in template.variables}
    text = prompts.render(name, **marks)
    assert all(mark in text for mark in marks.values()) and "{{" not in text


def test_there_is_one_template_a_role() -> None:
    roles = {"planner", "deduplication", "motivation_checker", "code_checker", "debugger", "analyzer", "summarizer"}
    assert roles <= set(prompts.names())


def test_the_contract_names_what_the_verifier_measures() -> None:
    text = prompts.render("system_design").lower()
    for word in ("class deltanet", "causal", "sub-quadratic", "chunk", "any length", "any batch", "einops", "gradient"):
        assert word in text, word
    for default in ("hidden_size=1024", "num_heads=4", "use_short_conv=true", "norm_eps=1e-5", "**kwargs"):
        assert default in text, default


@hypothesis.given(st.text(), st.text())
@hypothesis.settings(max_examples=60)
def test_values_are_inserted_once_and_never_read(question: str, complaint: str) -> None:
    braces = "{{question}} {complaint} {{{{x}}}} {0!r} %s \\1 \\g<0>"
    text = prompts.render("again", question=question + braces, complaint=complaint)
    assert question + braces in text and complaint in text
    assert text.count("{{question}}") == 1 + question.count("{{question}}") + complaint.count("{{question}}")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"question": "q"}, "missing: complaint"),
        ({"question": "q", "complaint": "c", "extra": "e"}, "unknown: extra"),
        ({"question": "q", "complaint": 3}, "expected text for complaint, got int"),
    ],
)
def test_wrong_variables_are_named(values: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)):
        prompts.render("again", **values)


def test_an_unknown_prompt_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="planner"):
        prompts.render("plannner")


@pytest.mark.parametrize(
    "content",
    [
        "other: what for\n---\ntext",
        "x: what for\nvariable\n---\n{{variable}}",
        "x: what for\nvalue: once\nvalue: twice\n---\n{{value}}",
        "x: what for\nvalue: declared\n---\nnot used",
        "x: what for\n---\n{{used}}",
        "x: what for\nvalue: what\n---\n{{value}} and {{ value }}",
        "x: what for\nvalue: what\n{{value}}",
        "",
    ],
)
def test_a_malformed_template_is_refused(content: str) -> None:
    with pytest.raises(UsageError, match="prompt x"):
        prompts.parse("x", content)


@hypothesis.given(st.text(alphabet="`ab\n", max_size=30))
@hypothesis.settings(max_examples=100)
def test_no_text_ends_its_own_block(text: str) -> None:
    block = prompts.fenced(text, "python")
    fence = re.match(r"`+", block)
    assert fence is not None and len(fence[0]) >= 3
    assert block.count(fence[0]) == 2 and block.endswith(f"\n{fence[0]}")
