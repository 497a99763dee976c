"""Evaluate without an LLM: the designer repairs what failed in training, or the experiment ends cleanly."""

from __future__ import annotations

from dataclasses import dataclass

from common.records import RunRecord
from pipeline.agents.roles import DesignContext, Proposal
from pipeline.designer import Designer
from pipeline.evolve.offline import repaired

__all__ = ["OfflineDebugger"]


@dataclass(frozen=True)
class OfflineDebugger:
    designer: Designer

    def repair(
        self, proposal: Proposal, run: RunRecord, error_tail: str, context: DesignContext, attempt: int
    ) -> Proposal | None:
        failure = f"{run.reason}: {run.detail}\n{error_tail}"
        return repaired(self.designer, proposal, failure, context, f"{context.key}/debug/{attempt}")
