"""What the candidate set has to be, from the events of a store alone: the published rules over a few dictionaries.

Elements enter in batches once the cold start is over, or when they are scored after their batch was merged; only those
measured against the baseline of now, near its loss and not far below its benchmark, and with a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from common.records import Baseline
from database.ledger import Event

PUBLISHED_LOSS, PUBLISHED_BENCHMARK, WIDTH = 4.575, 0.224, 0.1


@dataclass
class Design:
    """Loss and benchmark mean; the key of the baseline that it was measured against, None for the published one."""

    loss: float | None
    benchmark: float | None
    key: str | None = None
    parent: int | None = None
    score: float | None = None


@dataclass
class CandidateModel:
    """`known` gives what was measured of a design, by its index and name; `baselines` are those put, the newest
    last."""

    capacity: int
    cold_start: int
    batch: int
    known: Callable[[int, str], Design]
    baselines: dict[str, Baseline]
    stored: dict[int, Design] = field(default_factory=dict)
    given: list[int] = field(default_factory=list)
    """Every index since the store was emptied, in the order of the events."""
    members: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    """The set as the events of kind "candidates" tell it."""
    merged: int = 0
    seen: int = 0
    """Id of the last event."""
    _unsettled: set[int] = field(default_factory=set)

    def follow(self, events: list[Event]) -> None:
        for event in events:
            assert event.id == self.seen + 1, "no event is missing"
            self.seen = event.id
            self._apply(event)

    def _apply(self, event: Event) -> None:
        index, data = event.index, event.data
        if event.kind == "cleared":
            self.stored, self.given, self.members, self.told, self.merged = {}, [], set(), set(), 0
            self._unsettled = set()
        elif event.kind == "candidates":
            self.told = (self.told | set(data["added"])) - set(data["removed"])
            assert self.told == self.members, event
        if index is None:
            return
        if event.kind == "added":
            of = self.known(index, data["name"])
            self.stored[index] = Design(of.loss, of.benchmark, of.key, data["parent"])
            self.given.append(index)
            self._unsettled.add(index)
            new = [other for other in self.stored if other > self.merged]
            explored = sum(design.parent is not None for design in self.stored.values())
            if len(new) >= self.batch and explored >= self.cold_start:
                self.merge(new)
                self.merged = index
        elif event.kind == "removed":
            del self.stored[index]
            self.members.discard(index)
        elif event.kind == "parent":
            self.stored[index].parent = data["parent"]
        elif event.kind == "scored":
            self._scored(index, data["score"])

    def _scored(self, index: int, score: float | None) -> None:
        design = self.stored[index]
        # The first root has a score before it is embedded: it is what others are judged by.
        anchor = index == 1 and design.parent is None and design.score is None
        design.score = score
        if index in self._unsettled and not anchor:
            self._unsettled.discard(index)
            if index <= self.merged:
                self.merge([index])

    def merge(self, new: list[int]) -> None:
        key = self.key()
        entering = [index for index in new if self.stored[index].key == key and self._admitted(self.stored[index])]
        self.members |= {index for index in entering if self.stored[index].score is not None}
        self.members = set(self.ranked()[: self.capacity])

    def key(self) -> str | None:
        """Of the baseline of now."""
        held = {design.key for design in self.stored.values()}
        return next((key for key in reversed(self.baselines) if key in held), None)

    def ranked(self) -> list[int]:
        """The set, best first."""
        key = self.key()

        def rank(index: int) -> tuple[bool, bool, float, int]:
            design = self.stored[index]
            return design.key != key, design.score is None, -(design.score or 0.0), index

        return sorted(self.members, key=rank)

    # By hand

    def add(self, index: int) -> bool:
        """Puts one in; whether that is allowed: a full set gives up its lowest for a better one only."""
        if index in self.members:
            return True
        if len(self.members) >= self.capacity:
            key, design, last = self.key(), self.stored[index], self.ranked()[-1]
            lowest = self.stored[last]
            above = lowest.score is None or (design.score is not None and design.score > lowest.score)
            if (design.key == key) != (lowest.key == key):
                above = design.key == key
            if design.score is None or not above:
                return False
            self.members.discard(last)
        self.members.add(index)
        return True

    def force(self) -> None:
        self.merge(sorted(self.stored)[-300:])
        self.merged = max(self.stored, default=0)

    def rebuild(self) -> None:
        key = self.key()
        self.members = {
            index for index, design in self.stored.items() if design.key == key and design.score is not None
        }
        self.members = set(self.ranked()[: self.capacity])

    def _admitted(self, design: Design) -> bool:
        """The leak rule: against element 1 where it was measured against the same baseline, else the baseline."""
        loss, benchmark, widths = PUBLISHED_LOSS, PUBLISHED_BENCHMARK, (WIDTH, WIDTH)
        if design.key is not None:
            baseline = self.baselines[design.key]
            assert baseline.benchmark is not None
            loss, benchmark = baseline.loss, baseline.benchmark
            widths = (max(WIDTH, baseline.loss_clip), max(WIDTH, baseline.benchmark_clip))
        first = self.stored.get(1)
        if first is not None and first.key == design.key:
            loss = loss if first.loss is None else first.loss
            benchmark = benchmark if first.benchmark is None else first.benchmark
        if design.loss is None or design.benchmark is None:
            return False
        near = abs(design.loss - loss) / loss < widths[0]
        return near and (benchmark <= 0 or (design.benchmark - benchmark) / benchmark > -widths[1])
