"""The offline designer: a grammar of linear-attention mechanisms, a renderer, and a search that learns what helps.

Pure Python: programs are written as text here and executed only in the sandbox.
"""

from __future__ import annotations

from pipeline.designer.designer import Design, Designer, Outcome, Source
from pipeline.designer.fingerprint import fingerprint
from pipeline.designer.grammar import (
    DELTA_NET,
    GATED_DELTA_NET,
    MECHANISMS,
    OPTIONS,
    SLOTS,
    Genome,
    describe_change,
    mechanisms_of,
)
from pipeline.designer.mechanism import Mechanism
from pipeline.designer.operators import OPERATORS
from pipeline.designer.render import genome_of, render

__all__ = [
    "DELTA_NET",
    "GATED_DELTA_NET",
    "MECHANISMS",
    "OPERATORS",
    "OPTIONS",
    "SLOTS",
    "Design",
    "Designer",
    "Genome",
    "Mechanism",
    "Outcome",
    "Source",
    "describe_change",
    "fingerprint",
    "genome_of",
    "mechanisms_of",
    "render",
]
