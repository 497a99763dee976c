"""benchmarks/database.py in its short form: every question is asked and compared with a full scan, and what the README
says of the limits is what the benchmark marks. No speed is asserted: the machine of a test may be busy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import database as benchmark
from benchmarks import database_report as table
from common.process import REPOSITORY

SIZE = 150


@pytest.fixture(scope="module", params=["sqlite", pytest.param("mongodb", marks=pytest.mark.services)])
def report(request: pytest.FixtureRequest) -> Iterator[table.Report]:
    yield benchmark.run(request.param, SIZE, requests=3, seconds=0.5, small=True, say=print)


@pytest.mark.slow
def test_every_limited_question_is_asked_and_shown_with_its_ratio(report: table.Report) -> None:
    found = {answer.question: answer for answer in report.answers}
    assert set(table.LIMITS) <= set(found)
    assert all(
        0 < answer.p50 <= answer.p99 and (answer.ratio is None or answer.ratio > 0) and answer.times == 3
        for answer in found.values()
    )
    assert report.inserts is not None and report.inserts.rate > 0 and report.inserts.fsync_ms > 0
    assert report.start_seconds > 0 and report.rss_mb > 10 and report.vector_mb > 0
    shown = table.show([report])
    assert report.store in shown and all(question in shown for question in found)
    assert ("the limit is" in shown) == (report.store == "SQLite"), "what is promised holds for the default store"


def test_a_question_beyond_its_limit_is_marked() -> None:
    for beyond, mark in ((0.6, "5.6!"), (-0.6, "4.4 ")):
        limit = table.LIMITS["by index"]
        answer = table.Answer("by index", p50=1.0, p99=limit + beyond, cpu_ms=0.5, ratio=9.0, limit=limit)
        report = table.Report("SQLite", SIZE, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, answers=[answer])
        assert mark in table.show([report]) and report.missed == ("!" in mark)
    slow = table.Report("SQLite", SIZE, 1.0, 5.5, 1.0, 1.0, 1200.0, 100.0, answers=[answer])
    assert "5.5!" in table.show([slow]) and "1200!" in table.show([slow]) and slow.missed


def test_the_readme_has_the_limits_of_the_benchmark() -> None:
    text = (REPOSITORY / "README.md").read_text()
    rows = text.split("| question | 1,000 | 10,000 | 100,000 elements |")[1].split("\n\n")[0]
    told = {
        name: cells[-1]
        for row in rows.splitlines()[2:]
        for cells in [[cell.strip() for cell in row.strip("| ").split("|")]]
        for name in cells[0].split("; ")
    }
    renamed = {
        "sample parent": "parent",
        "similar": "similar, beyond bare FAISS",
        "uct select": "UCT select",
    }
    wanted = {question: float(limit) for question, limit in table.LIMITS.items() if question != "sample element"}
    wanted["uct select"] = 150.0
    assert {name: float(told[renamed.get(name, name)]) for name in wanted} == wanted
    assert told["durable inserts a second, 8 clients"] == "1,000"
    assert told["start"] == told["memory"] == "5 s; 1 GB and vectors"
