"""The offline designer: proposes the next architecture from a parent, references, insights and what helped before.

    operator   Thompson sampling over the gains of each operator, unused operators favoured
    candidate  among that operator's genomes: a Thompson draw of each new mechanism's gain, plus a bonus for mechanisms
               that the insights name and one for mechanisms never tried

Everything is drawn from one generator seeded by the arguments: the same call gives the same design in any process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.errors import UsageError
from pipeline.designer.fingerprint import fingerprint
from pipeline.designer.grammar import (
    DELTA_NET,
    MECHANISMS,
    Genome,
    describe_change,
    differing_slots,
    mechanism_at,
    mechanisms_of,
)
from pipeline.designer.motivation import insight_strengths, motivation, repair_motivation
from pipeline.designer.operators import OPERATORS, Candidate, candidates, repairs
from pipeline.designer.render import genome_of, render

__all__ = ["Design", "Designer", "Outcome", "Source"]

_INSIGHT_BONUS = 3.0  # in units of one standard deviation of the gains seen
_NEW_MECHANISM_BONUS = 1.0
_NEW_OPERATOR_BONUS = 0.5
_FAILED_GAIN = -1.0


@dataclass(frozen=True)
class Source:
    """An architecture to start from or to borrow from."""

    name: str
    program: str
    motivation: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of an earlier design.

    `slot`: its changed slots joined by '+'; `gain`: its score minus its parent's, None when it failed.
    """

    operator: str
    slot: str
    mechanisms: tuple[str, ...]
    gain: float | None


@dataclass(frozen=True)
class Design:
    """A proposed architecture.

    `mechanisms`: all that the program uses; `slot`: the changed slots joined by '+'; `base`: the genome that was
    changed.
    """

    name: str
    genome: Genome
    program: str
    motivation: str
    operator: str
    change: str
    mechanisms: tuple[str, ...]
    fingerprint: str
    parent_fingerprint: str
    slot: str = ""
    base: Genome | None = None

    def outcome(self, gain: float | None) -> Outcome:
        """This design as an entry of the history."""
        return Outcome(self.operator, self.slot, self.mechanisms, gain)


class _Record:
    """Gains of operators and mechanisms in the history, in units of their own spread, with Normal posteriors."""

    def __init__(self, history: Sequence[Outcome]) -> None:
        gains = [outcome.gain for outcome in history if outcome.gain is not None]
        self.scale = (sum(gain * gain for gain in gains) / len(gains)) ** 0.5 if gains else 1.0
        self.values: dict[str, list[float]] = {}
        self.raw: dict[str, list[float]] = {}
        self.seen: set[str] = set()
        for outcome in history:
            value = _FAILED_GAIN if outcome.gain is None else max(-3.0, min(3.0, outcome.gain / (self.scale or 1.0)))
            self.seen.update(outcome.mechanisms)
            for name in (f"operator {outcome.operator}", *self._introduced(outcome)):
                self.values.setdefault(name, []).append(value)
                if outcome.gain is not None:
                    self.raw.setdefault(name, []).append(outcome.gain)

    @staticmethod
    def _introduced(outcome: Outcome) -> list[str]:
        """The mechanisms that the change brought in; all of them when the history does not say which slot changed."""
        slots = outcome.slot.split("+") if outcome.slot else None
        known = [name for name in outcome.mechanisms if name in MECHANISMS]
        return [name for name in known if slots is None or MECHANISMS[name].slot in slots]

    def draw(self, name: str, rng: random.Random) -> float:
        """One sample of the posterior mean gain: prior N(0, 1), unit noise."""
        values = self.values.get(name, [])
        weight = len(values) + 1.0
        return rng.gauss(sum(values) / weight, weight**-0.5)

    def means(self) -> dict[str, tuple[int, float]]:
        return {name: (len(gains), sum(gains) / len(gains)) for name, gains in self.raw.items()}


class Designer:
    """Proposes and repairs designs. Holds nothing but its seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def propose(
        self,
        parent: Source,
        references: Sequence[Source],
        insights: str,
        history: Sequence[Outcome],
        avoid: Collection[str],
        key: str,
    ) -> Design:
        """The next design.

        insights: the knowledge base's answer to the parent's analysis; avoid: fingerprints and canonical genomes
        (`Genome.to_json()`) that must not come back; key: names this experiment, so that parallel ones differ.
        The design never equals the parent or a reference.

        Raises:
            UsageError: a program is not Python, or every neighbour of the parent is in `avoid`.
        """
        rng = self._generator("propose", key, parent, references, insights, history, avoid)
        genomes = [genome_of(reference.program) for reference in references]
        own = genome_of(parent.program)
        base = own or next((genome for genome in genomes if genome is not None), DELTA_NET)
        parent_fingerprint = fingerprint(parent.program)
        blocked = {*avoid, parent_fingerprint, base.to_json() if own else ""}
        blocked |= {fingerprint(reference.program) for reference in references}
        blocked |= {genome.to_json() for genome in genomes if genome is not None}

        record = _Record(history)
        tried = record.seen | _mechanisms_in(avoid)
        tried |= {name for genome in (base, *genomes) if genome is not None for name in mechanisms_of(genome)}
        for candidate in self._ranked(base, genomes, insights, record, tried, rng):
            if candidate.genome.to_json() in blocked:
                continue
            name = design_name(base, candidate.genome)
            program = render(candidate.genome, name)
            mark = fingerprint(program)
            if mark in blocked:
                continue
            source = references[candidate.source].name if candidate.source is not None else None
            text = motivation(
                parent.name,
                base,
                candidate.genome,
                insights=insights,
                source=source,
                known=own is not None,
                record=record.means(),
            )
            return _design(name, candidate.genome, program, text, candidate.operator, mark, parent_fingerprint, base)
        raise UsageError(
            f"expected a genome near {parent.name} that was not proposed before, but all are to be avoided",
            "choose another parent or give references",
        )

    def repair(self, design: Design | Genome, failure: str, avoid: Collection[str], key: str) -> Design | None:
        """The design without the mechanism that most likely caused `failure`; None if nothing sensible is left.

        failure: names of failed checks with their details, or an error log. The result is never the design's own
        parent, a plain DeltaNet or in `avoid`. Nothing in it is random: `key` only matters to other designers.
        """
        genome = design.genome if isinstance(design, Design) else design
        base = design.base if isinstance(design, Design) else None
        previous = design.motivation if isinstance(design, Design) else ""
        parent_fingerprint = design.parent_fingerprint if isinstance(design, Design) else ""
        for repaired in repairs(genome, failure):
            if repaired in (base, genome, DELTA_NET) or repaired.to_json() in avoid:
                continue
            start = base or genome
            name = design_name(start, repaired)
            program = render(repaired, name)
            mark = fingerprint(program)
            if mark in avoid or mark == parent_fingerprint:
                continue
            text = repair_motivation(genome, repaired, failure, previous)
            return _design(name, repaired, program, text, "repair", mark, parent_fingerprint, start)
        return None

    def _generator(self, *arguments: object) -> random.Random:
        """A generator seeded by every argument: sequences in their order, unordered collections sorted."""
        text = json.dumps([self.seed, *arguments], default=_plain, sort_keys=True)
        return random.Random(int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big"))

    @staticmethod
    def _ranked(
        base: Genome,
        references: Sequence[Genome | None],
        insights: str,
        record: _Record,
        tried: Collection[str],
        rng: random.Random,
    ) -> list[Candidate]:
        """All candidates, best first: operators by their draw, within an operator by the draws of their mechanisms."""
        table = candidates(base, references, rng)
        named = insight_strengths(insights)
        draws = {name: record.draw(name, rng) for name in sorted(MECHANISMS)}
        worth = {
            name: draw + _INSIGHT_BONUS * named.get(name, 0.0) + _NEW_MECHANISM_BONUS * (name not in tried)
            for name, draw in draws.items()
        }

        def value(candidate: Candidate) -> float:
            """Mean worth of what is new; what is taken out counts with the opposite sign of its own draw."""
            terms = []
            for slot in candidate.slots:
                new = mechanism_at(slot, getattr(candidate.genome, slot))
                old = mechanism_at(slot, getattr(base, slot))
                terms.append(worth[new.name] if new is not None else -draws[old.name] if old is not None else 0.0)
            return sum(terms) / len(terms)

        order = []
        for operator in OPERATORS:
            ranked = sorted(table[operator], key=lambda c: (-value(c), c.genome.to_json()))
            if ranked:
                unused = f"operator {operator}" not in record.values
                best = value(ranked[0]) + record.draw(f"operator {operator}", rng) + _NEW_OPERATOR_BONUS * unused
                order.append((-best, operator, ranked))
        return [candidate for _, _, ranked in sorted(order, key=lambda item: item[:2]) for candidate in ranked]


def design_name(base: Genome, genome: Genome) -> str:
    """`delta_net_`, up to two words of what changed, and five hex digits of the genome."""
    words = []
    for slot in differing_slots(base, genome):
        mechanism = mechanism_at(slot, getattr(genome, slot))
        words.append(mechanism.name if mechanism is not None else f"no_{slot}")
    mark = hashlib.sha256(genome.to_json().encode()).hexdigest()[:5]
    return f"delta_net_{'_'.join(words[:2])[:44].strip('_')}_{mark}"


def _design(
    name: str, genome: Genome, program: str, text: str, operator: str, mark: str, parent_mark: str, base: Genome
) -> Design:
    return Design(
        name=name,
        genome=genome,
        program=program,
        motivation=text,
        operator=operator,
        change=describe_change(base, genome),
        mechanisms=mechanisms_of(genome),
        fingerprint=mark,
        parent_fingerprint=parent_mark,
        slot="+".join(differing_slots(base, genome)),
        base=base,
    )


def _mechanisms_in(avoid: Collection[str]) -> set[str]:
    """Mechanisms of the canonical genomes among the texts to avoid: designs that are under way count as tried."""
    found: set[str] = set()
    for text in avoid:
        if text.startswith("{"):
            try:
                found.update(mechanisms_of(Genome.from_json(text)))
            except UsageError:
                continue  # a genome of another version of the grammar
    return found


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Collection):
        return sorted(map(str, value))
    raise TypeError(f"cannot be part of a design's seed: {type(value).__name__}")
