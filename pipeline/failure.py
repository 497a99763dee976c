"""How an experiment ends without an element."""

from __future__ import annotations

from typing import Any

__all__ = ["ExperimentFailed"]


class ExperimentFailed(Exception):  # noqa: N818 - an outcome of the search, not an error of the software
    """The experiment ends here: journalled and shown, stored as no element.

    Args:
        stage: evolve or evaluate.
        reason: one word for the table: repeated, refused, or the run's reason.
        detail: one sentence for a person.
        attempts: what was tried, each as a plain object.
    """

    def __init__(self, stage: str, reason: str, detail: str, attempts: list[dict[str, Any]]) -> None:
        super().__init__(f"{stage}: {reason}: {detail}")
        self.stage, self.reason, self.detail, self.attempts = stage, reason, detail, attempts
