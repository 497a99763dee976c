"""The knowledge corpus as files: form, length, symptoms, and no sentence that serves two entries.

python -m pytest tests/cognition_base/test_corpus_files.py -q
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

CORPUS = Path(__file__).resolve().parents[2] / "cognition_base" / "cognition"
FILES = sorted(CORPUS.glob("*.json"))
FIELDS = (
    "DESIGN_INSIGHT",
    "EXPERIMENTAL_TRIGGER_PATTERNS",
    "BACKGROUND",
    "ALGORITHMIC_INNOVATION",
    "IMPLEMENTATION_GUIDANCE",
    "DESIGN_AI_INSTRUCTIONS",
)
LEAST_PAPERS = 25
LEAST_SYMPTOMS = 3
SHORTEST_SYMPTOM = 6  # words; fewer say nothing a search could match
MOST_BACKGROUND_WORDS = 200
LONGEST_COMMON_SENTENCE = 8
ARXIV_STEM = re.compile(r"\d{2}(0[1-9]|1[0-2])_\d{4,5}")
HEADINGS = {
    "ALGORITHMIC_INNOVATION": (
        "Core algorithm:",
        "Key mechanism:",
        "Mathematical formulation:",
        "Computational properties:",
    ),
    "IMPLEMENTATION_GUIDANCE": ("Integration:", "Parameters:", "Apply", "Expected:"),
    "EXPERIMENTAL_TRIGGER_PATTERNS": ("Task performance signatures:", "Architectural symptoms:"),
}

Entry = dict[str, str]


def entries_of(path: Path) -> list[Entry]:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, list), f"{path.name}: expected a list of entries, got {type(loaded).__name__}"
    return loaded


def symptoms_of(entry: Entry) -> list[str]:
    """The symptoms of an entry: the lines of its trigger patterns that start with '- '."""
    return [line[2:] for line in entry["EXPERIMENTAL_TRIGGER_PATTERNS"].splitlines() if line.startswith("- ")]


def sentences_of(text: str) -> list[str]:
    """Sentences and lines of a text, lower-cased, punctuation dropped, so that small edits do not hide a copy."""
    pieces = re.split(r"(?<=[.!?;:])\s+|\n+", text)
    return [" ".join(re.findall(r"[a-z0-9]+", piece.lower())) for piece in pieces]


def words_of(text: str) -> int:
    return len(text.split())


def test_enough_papers() -> None:
    assert len(FILES) >= LEAST_PAPERS, f"expected at least {LEAST_PAPERS} papers in {CORPUS}, got {len(FILES)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestPaper:
    def test_name_is_the_arxiv_id(self, path: Path) -> None:
        assert ARXIV_STEM.fullmatch(path.stem), f"{path.name}: expected an arXiv id with '_' for '.'"

    def test_entries_have_exactly_the_six_text_fields(self, path: Path) -> None:
        entries = entries_of(path)
        assert 1 <= len(entries) <= 3
        for entry in entries:
            assert tuple(entry) == FIELDS
            assert all(isinstance(text, str) and text == text.strip() != "" for text in entry.values())

    def test_insight_has_a_priority_and_differs_inside_the_paper(self, path: Path) -> None:
        insights = [entry["DESIGN_INSIGHT"] for entry in entries_of(path)]
        for insight in insights:
            assert re.match(r"### DESIGN_INSIGHT_(HIGH|MEDIUM|LOW): \S", insight), insight
        assert len(set(insights)) == len(insights)

    def test_background_is_short_and_names_its_paper(self, path: Path) -> None:
        for entry in entries_of(path):
            assert words_of(entry["BACKGROUND"]) < MOST_BACKGROUND_WORDS
            assert f"(arXiv:{path.stem.replace('_', '.')})" in entry["BACKGROUND"]

    def test_symptoms_are_several_and_distinct(self, path: Path) -> None:
        for entry in entries_of(path):
            symptoms = symptoms_of(entry)
            assert len(set(symptoms)) == len(symptoms) >= LEAST_SYMPTOMS
            assert all(words_of(symptom) >= SHORTEST_SYMPTOM for symptom in symptoms), symptoms

    def test_structured_fields_hold_their_parts(self, path: Path) -> None:
        for entry in entries_of(path):
            for field, headings in HEADINGS.items():
                starts = [line for line in entry[field].splitlines() if not line.startswith("- ")]
                for heading in headings:
                    assert sum(line.startswith(heading) for line in starts) == 1, (path.name, field, heading)

    def test_instructions_are_two_to_four_sentences(self, path: Path) -> None:
        for entry in entries_of(path):
            sentences = re.findall(
                r"[^.!?]+[.!?](?=\s|$)", re.sub(r"(?<=\d)\.(?=\d)", "", entry["DESIGN_AI_INSTRUCTIONS"])
            )
            assert 2 <= len(sentences) <= 4, sentences


def test_no_sentence_serves_two_entries() -> None:
    """Text filled from a template would repeat whole sentences; a sentence of more than 8 words occurs once."""
    places: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        for number, entry in enumerate(entries_of(path)):
            for text in entry.values():
                for sentence in sentences_of(text):
                    if words_of(sentence) > LONGEST_COMMON_SENTENCE and "arxiv" not in sentence:
                        places[sentence].add(f"{path.stem}[{number}]")
    shared = {sentence: sorted(where) for sentence, where in places.items() if len(where) > 1}
    assert not shared


def test_entries_are_apart_in_their_symptoms() -> None:
    """Symptoms are the retrieval key: two entries that share most of their words could not be told apart."""
    bags: list[tuple[str, set[str]]] = []
    for path in FILES:
        for number, entry in enumerate(entries_of(path)):
            words = set(re.findall(r"[a-z]{4,}", " ".join(symptoms_of(entry)).lower()))
            bags.append((f"{path.stem}[{number}]", words))
    close = [
        (name, other)
        for i, (name, words) in enumerate(bags)
        for other, others in bags[:i]
        if len(words & others) / len(words | others) > 0.4
    ]
    assert not close
