"""What ending hopeless runs saved, and how often it was wrong, from the runs that were let through."""

from __future__ import annotations

from collections.abc import Sequence

from common.records import RunRecord
from common.text import counted

__all__ = ["hopeless_text"]


def hopeless_text(runs: Sequence[RunRecord]) -> str | None:
    """One paragraph for the report; None where the monitor found no run hopeless.

    Args:
        runs: every run of the search, finished or not.
    """
    found = [(run, run.forecast) for run in runs if run.forecast is not None]
    if not found:
        return None
    ended = [(run, why) for run, why in found if run.reason == "hopeless"]
    spared = [(run, why) for run, why in found if why.spared and run.heldout_loss is not None]
    wrong = sum(run.heldout_loss.value <= why.threshold for run, why in spared if run.heldout_loss is not None)
    rate = f"{wrong} of {len(spared)} would have been candidates after all" if spared else "none has finished yet"
    saved, spent = _saved(runs, [run for run, _ in ended])
    share = f", {saved / (saved + spent):.0%} of all training" if saved + spent > 0 else ""
    return (
        f"Hopeless: {counted(len(found), 'run')} predicted to end above the candidates' threshold; {len(ended)} ended, "
        f"which saved about {saved:,.0f} CPU seconds of training{share}. Let through to measure that: {len(spared)}; "
        f"{rate}."
    )


def _saved(runs: Sequence[RunRecord], ended: Sequence[RunRecord]) -> tuple[float, float]:
    """(CPU seconds that the rest of the ended runs would have taken, those that all finished runs took)."""
    finished = [run for run in runs if run.status == "finished"]
    costs = [run.seconds["train_cpu"] for run in finished if "train_cpu" in run.seconds]
    if not costs:
        return 0.0, 0.0
    whole = sum(costs) / len(costs)
    steps = max((max(map(int, run.train_loss), default=0) for run in finished), default=0)
    left = [1 - max(map(int, run.train_loss), default=0) / steps for run in ended] if steps else []
    return whole * sum(left), sum(costs)
