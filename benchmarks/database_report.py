"""The figures of benchmarks/database.py, their limits and their table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.database_inserts import Inserts

__all__ = ["LIMITS", "Answer", "Report", "show"]

LIMITS = {
    "sample candidates": 10, "sample parent": 10, "sample element": 10, "by index": 5, "top 10": 20, "context": 10,
    "children": 10, "path": 10, "uct select": 20, "similar": 5,
}  # fmt: skip
"""Milliseconds at the 99th percentile; of similar: beyond bare FAISS. uct select may take 150 at 100,000."""
START_SECONDS = 5.0
MEMORY_MB = 1024.0
"""Beside the vectors."""


@dataclass(frozen=True)
class Answer:
    """Milliseconds of one question, those of the server's CPU, and how many times its median a full scan takes."""

    question: str
    p50: float
    p99: float
    cpu_ms: float
    ratio: float | None
    """None of a draw, which a scan would be spared as well."""
    limit: float | None
    note: str = ""
    times: int = 0
    """How often it was asked."""

    @property
    def missed(self) -> bool:
        return self.limit is not None and self.p99 > self.limit


@dataclass
class Report:
    """One store at one size."""

    store: str
    size: int
    document_bytes: float
    start_seconds: float
    counted_seconds: float
    """Until the numbers of elements are known as well."""
    first_search_seconds: float
    rss_mb: float
    vector_mb: float
    bare: tuple[float, float] | None = None
    """p50 and p99 in milliseconds of the driver's own find of one document by its index, where there is a server."""
    inserts: Inserts | None = None
    answers: list[Answer] = field(default_factory=list)

    @property
    def _limited(self) -> bool:
        # A MongoDB-wire server is shown for what it is; what is promised holds for the default store.
        return self.store == "SQLite"

    @property
    def late(self) -> bool:
        return self._limited and self.start_seconds > START_SECONDS

    @property
    def large(self) -> bool:
        return self._limited and self.rss_mb - self.vector_mb > MEMORY_MB

    @property
    def missed(self) -> bool:
        """Whether a limit is not held."""
        few = self.inserts is not None and self.inserts.rate < self.inserts.limit
        return self._limited and (self.late or self.large or few or any(one.missed for one in self.answers))


def show(reports: list[Report]) -> str:
    """One row a question, the sizes side by side: p50 / p99 and CPU in ms, ratio of a full scan to p50."""
    lines = []
    for store in dict.fromkeys(report.store for report in reports):
        ours = [report for report in reports if report.store == store]
        # A MongoDB-wire server is shown for what it is; what is promised holds for the default store.
        limited = store == "SQLite"
        lines.append(
            f"\n{store}: p50 / p99 in ms, CPU of the server in ms (how much longer a full scan takes); limit in ms"
        )
        heads = "".join(f"{report.size:>36,}" for report in ours)
        lines.append(f"{'':20}{heads}")
        for position, answer in enumerate(ours[0].answers):
            cells = ""
            for report in ours:
                one = report.answers[position]
                mark = "!" if limited and one.missed else " "
                longer = "" if one.ratio is None else f" ({one.ratio:,.0f}x)"
                cells += f"{f'{one.p50:.1f} / {one.p99:.1f}{mark} {one.cpu_ms:.1f}{longer}':>36}"
            limit = ours[-1].answers[position].limit if limited else None
            lines.append(f"{answer.question:20}{cells}   {'' if limit is None else f'{limit:.0f}'}")
        rows: list[tuple[str, Callable[[Report], str]]] = [
            ("inserts/s, 8 clients", lambda r: "" if r.inserts is None else r.inserts.shown(r.store == "SQLite")),
            (
                "start, s",
                lambda r: f"{r.start_seconds:.1f}{'!' * r.late}, first search {r.first_search_seconds:.1f}",
            ),
            ("memory, MB", lambda r: f"{r.rss_mb:.0f}{'!' * r.large}, of it vectors {r.vector_mb:.0f}"),
            ("bytes an element", lambda r: f"{r.document_bytes:,.0f}"),
        ]
        if not limited:
            rows += [
                ("counted after, s", lambda r: f"{r.counted_seconds:.1f}"),
                ("bare find_one, ms", lambda r: "" if r.bare is None else f"{r.bare[0]:.1f} / {r.bare[1]:.1f}"),
            ]
        for name, cell in rows:
            lines.append(f"{name:20}" + "".join(f"{cell(report):>36}" for report in ours))
        for report in ours:
            seldom = [f"{one.question} {one.times}" for one in report.answers if one.times < 100]
            if seldom:
                lines.append(
                    f"at {report.size:,} asked fewer than 100 times, so that p99 is the worst: {', '.join(seldom)}"
                )
            lines.append(f"similar at {report.size:,}: {report.answers[-1].note}")
            if report.inserts is not None and limited:
                lines.append(f"inserts at {report.size:,}: {report.inserts.limit_shown()}")
    return "\n".join(lines)
