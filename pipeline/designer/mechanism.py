"""What one mechanism of the grammar is: its place, its words, its reason and its source."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mechanism"]


@dataclass(frozen=True)
class Mechanism:
    """One way to fill one slot of a genome. All texts are plain English without a final full stop.

    name: unique; option: how the genome writes it in `slot`; title: for tables and motivations; keywords: phrases by
    which a text of the knowledge base names the mechanism; why: why it should help; paper: arXiv id of the source;
    symptom: what in an analysis asks for it; expect: which number should move; risk: what may go wrong;
    cost: rough time of a mixer with it relative to DeltaNet, by which the repair of a slow program picks its suspect.
    """

    name: str
    slot: str
    option: str
    title: str
    keywords: tuple[str, ...]
    why: str
    paper: str
    symptom: str
    expect: str
    risk: str
    cost: float = 1.0
