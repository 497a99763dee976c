"""Words for a design: what changed, why it should help, what asked for it, what to expect, and the risk."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from pipeline.designer.grammar import DELTA_NET, MECHANISMS, SLOT_TITLES, Genome, differing_slots, mechanism_at
from pipeline.designer.mechanism import Mechanism

__all__ = ["insight_sentence", "insight_strengths", "motivation", "repair_motivation"]

_QUOTE = 180  # characters of an insight that a motivation quotes


def _pattern(keyword: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9]){re.escape(keyword.lower())}(?![a-z0-9])")


def insight_strengths(insights: str) -> dict[str, float]:
    """How strongly a text of the knowledge base names each mechanism, 0 to 1; mechanisms that it does not name are
    absent.

    A keyword counts by the logarithm of its occurrences, the arXiv id of the source like several keywords; the
    strongest mechanism gets 1.
    """
    text = insights.lower()
    found: dict[str, float] = {}
    for name, mechanism in MECHANISMS.items():
        value = sum(math.log1p(len(_pattern(keyword).findall(text))) for keyword in mechanism.keywords)
        if mechanism.paper in text or mechanism.paper.replace(".", "_") in text:
            value += 2.0
        if value > 0.0:
            found[name] = value
    most = max(found.values(), default=1.0)
    return {name: value / most for name, value in found.items()}


def insight_sentence(insights: str, mechanism: Mechanism) -> str:
    """The first sentence of the text that names the mechanism, shortened; empty when none does."""
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", insights):
        low = sentence.lower()
        if any(_pattern(keyword).search(low) for keyword in mechanism.keywords):
            clean = re.sub(r"^[\s#*\-]*(?:[A-Z_]+\w*: )?", "", sentence).strip().strip('"').replace('"', "'")
            if len(clean) > _QUOTE:
                clean = clean[: clean.rfind(" ", 0, _QUOTE)] + " ..."
            if len(clean) > 20:
                return clean
    return ""


def _title(slot: str, genome: Genome) -> str:
    mechanism = mechanism_at(slot, getattr(genome, slot))
    return mechanism.title if mechanism is not None else f"no {SLOT_TITLES[slot]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _context(base: Genome, genome: Genome, changed: Sequence[str]) -> str:
    """What the change meets in the program around it."""
    rest = [slot for slot in differing_slots(DELTA_NET, genome) if slot not in changed]
    if rest:
        around = ", ".join(f"{SLOT_TITLES[slot]} by {_title(slot, genome)}" for slot in rest)
        return f"Everything else is inherited, in particular {around}."
    kept = "the delta rule" if base.state == genome.state == "delta" else "its other parts"
    return (
        f"Apart from this the program keeps {kept}, so that a difference in the result can be put down to the change."
    )


def motivation(
    parent: str,
    base: Genome,
    genome: Genome,
    *,
    insights: str,
    source: str | None,
    known: bool,
    record: Mapping[str, tuple[int, float]],
) -> str:
    """One paragraph about `genome`, made from `base`.

    parent: name of the parent program; insights: what the knowledge base answered; source: name of the reference that
    lent the mechanisms; known: whether the parent belongs to the grammar, so that `base` is its genome; record:
    number of earlier designs that introduced a mechanism and their mean gain.
    """
    changed = differing_slots(base, genome)
    pairs = [(slot, _title(slot, base), _title(slot, genome)) for slot in changed]
    moves = "; ".join(f"the {SLOT_TITLES[slot]} goes from {old} to {new}" for slot, old, new in pairs)
    start = parent if known else f"the grammar's closest known form (since {parent} was not written in the grammar)"
    new = [m for slot in changed if (m := mechanism_at(slot, getattr(genome, slot))) is not None]
    gone = [m for slot in changed if getattr(genome, slot) == "none" and (m := mechanism_at(slot, getattr(base, slot)))]
    parts = [f"{_capital(moves)}, compared with {start}."]
    parts += [f"{_capital(mechanism.why)} (arXiv {mechanism.paper})." for mechanism in new]
    for mechanism in gone:
        parts.append(f"Taking out the {mechanism.title} tests its claim that {mechanism.why}.")
        parts.append(f"Its price goes with it: {mechanism.risk}.")
    parts.append(_reason(new or gone, insights))
    if source is not None:
        parts.append(f"{source} lends this part, already trained there; here it meets another memory.")
    for mechanism in new:
        count, mean = record.get(mechanism.name, (0, 0.0))
        if count:
            times = "once" if count == 1 else f"{count} times"
            parts.append(f"The {mechanism.title} was tried {times} before, with a mean change of score of {mean:+.3f}.")
    parts.append(_context(base, genome, changed))
    parts += _outlook(new, gone)
    return " ".join(part for part in parts if part)


def _outlook(new: Sequence[Mechanism], gone: Sequence[Mechanism]) -> list[str]:
    """What should be seen in the numbers, and what may go wrong."""
    if not new:
        lost = "; ".join(m.expect for m in gone)
        return [f"Expected: a faster, smaller mixer; if the removed part was at work, this effect is lost: {lost}."]
    lines = [f"Expected: {'; '.join(m.expect for m in new)}.", f"Risk: {'; '.join(m.risk for m in new)}."]
    slowest = max(m.cost for m in new)
    if slowest >= 1.2:
        lines.append(f"The mixer should take about {slowest:.1f} times as long as DeltaNet's.")
    return lines


def _reason(mechanisms: Sequence[Mechanism], insights: str) -> str:
    """Which insight, or which symptom, asked for the change."""
    symptoms = "; ".join(m.symptom for m in mechanisms)
    for mechanism in mechanisms:
        quote = insight_sentence(insights, mechanism)
        if quote:
            return f'Symptom: {symptoms}. To the parent\'s analysis the knowledge base answers: "{quote}".'
    return f"Symptom that it answers: {symptoms}." if symptoms else ""


def repair_motivation(before: Genome, after: Genome, failure: str, previous: str) -> str:
    """One paragraph about a repair: what failed, what was given up, and what the design was for."""
    slots = differing_slots(before, after)
    moves = "; ".join(f"{SLOT_TITLES[slot]} from {_title(slot, before)} to {_title(slot, after)}" for slot in slots)
    lines = " ".join(failure.split())
    shown = lines if len(lines) <= _QUOTE else lines[:_QUOTE] + " ..."
    text = f'Repair after a failure ("{shown}"): the likeliest cause is given up, {moves}; the other mechanisms stay.'
    return f"{text} The design was meant as follows. {previous}" if previous else _capital(text)
