"""How an experiment ends without an element."""

from __future__ import annotations

from typing import Any, Self

__all__ = ["ExperimentFailed"]


class ExperimentFailed(Exception):  # noqa: N818 - an outcome of the search, not an error of the software
    """The experiment ends here: journalled and shown, stored as no element.

    Args:
        stage: evolve or evaluate.
        reason: one word for the table: repeated, refused, fault (of ours, not of the design), or the run's reason.
        detail: one sentence for a person.

    """

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        super().__init__(f"{stage}: {reason}: {detail}")
        self.stage, self.reason, self.detail = stage, reason, detail
        self.attempts: list[dict[str, Any]] = []
        self.seconds = 0.0

    def after(self, attempts: list[dict[str, Any]], seconds: float) -> Self:
        """Adds what its stage tried, each as a plain object, and the stage's wall seconds."""
        self.attempts, self.seconds = attempts, round(seconds, 3)
        return self

    def record(self) -> dict[str, Any]:
        """What failed.json holds."""
        return {key: getattr(self, key) for key in ("stage", "reason", "detail", "attempts", "seconds")}
