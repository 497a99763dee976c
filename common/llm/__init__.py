"""Language models behind one small interface: an OpenAI-compatible endpoint, or a script for tests.

Importing this package is cheap: the client libraries load when `open_llm` builds a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import SettingsError
from common.knobs import Llm
from common.llm.calls import Call, CallLog, Totals, append_call, metered, usage_of
from common.llm.interface import LLM, Answer, NoUsableAnswerError
from common.llm.scripted import Reply, ScriptedBackend

__all__ = [
    "LLM",
    "Answer",
    "Call",
    "CallLog",
    "NoUsableAnswerError",
    "Reply",
    "ScriptedBackend",
    "Totals",
    "append_call",
    "metered",
    "open_llm",
    "usage_of",
]


def open_llm(settings: Llm, log: Path | None = None, secrets: Sequence[str] = ()) -> LLM:
    """Builds the backend that `settings` names. Its calls go to the JSONL file `log`.

    Args:
        secrets: strings that must never reach the log, besides the API key.

    Raises:
        SettingsError: the backend is `offline` (which asks no model), or the endpoint's settings are impossible.
    """
    if settings.backend == "offline":
        raise SettingsError("llm.backend is offline, which asks no model", "set --llm.backend openai")
    from common.llm.openai_backend import OpenAIBackend

    return OpenAIBackend(settings, CallLog(log, secrets=secrets))
