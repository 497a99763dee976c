"""Choosing the roles: the offline designer and analyst, or an LLM endpoint, behind the same Protocols."""

from __future__ import annotations

from pathlib import Path

from common.settings import Settings
from pipeline.agents.roles import Roles
from pipeline.analyse.offline import OfflineAnalyzer, OfflineSummarizer
from pipeline.designer import Designer
from pipeline.eval.offline import OfflineDebugger
from pipeline.evolve.offline import OfflineCodeChecker, OfflineMotivationChecker, OfflinePlanner

__all__ = ["build_roles"]


def build_roles(settings: Settings, logs: Path) -> Roles:
    """The roles that `settings.llm.backend` names.

    Args:
        logs: folder for the record of every LLM call.
    """
    if settings.llm.backend == "openai":
        # Imported here: the LLM client takes a second to import, which offline runs need not wait for.
        from pipeline.agents.llm_roles import llm_roles

        return llm_roles(settings, logs)
    designer = Designer(settings.run.seed)
    return Roles(
        planner=OfflinePlanner(designer),
        motivation_checker=OfflineMotivationChecker(),
        code_checker=OfflineCodeChecker(designer),
        debugger=OfflineDebugger(designer),
        analyzer=OfflineAnalyzer(),
        summarizer=OfflineSummarizer(),
    )
