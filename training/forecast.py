"""The held-out loss that a run will end with, predicted from the curves of earlier runs at the same step.

Peers' held-out losses are regressed on their training losses at one step (least squares); the run's own loss there
gives a prediction, and the spread of the peers around the line its 95 % band (Student's t, leverage included). Few
peers, peers alike, or a run far from all of them make the band wide: then nothing can be said, and nothing is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from common.t_quantile import t95

__all__ = ["FEWEST", "forecast"]

FEWEST = 6
"""Peers without which there is no forecast."""


def forecast(here: float, peers: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(Predicted held-out loss, lower end of its 95 % band); None with too few peers, or where all began alike.

    The run's true end lies below the lower end with 2.5 % probability, if it is a run like the peers.

    Args:
        here: the run's training loss at some step.
        peers: (training loss at that step, held-out loss at the end) of each.
    """
    if len(peers) < FEWEST:
        return None
    losses, ends = [loss for loss, _ in peers], [end for _, end in peers]
    mean, middle = statistics.fmean(losses), statistics.fmean(ends)
    spread = sum((loss - mean) ** 2 for loss in losses)
    if spread == 0:
        return None
    slope = sum((loss - mean) * (end - middle) for loss, end in peers) / spread
    predicted = middle + slope * (here - mean)
    left = sum((end - middle - slope * (loss - mean)) ** 2 for loss, end in peers)
    dof = len(peers) - 2
    error = math.sqrt(left / dof * (1 + 1 / len(peers) + (here - mean) ** 2 / spread))
    return predicted, predicted - t95(dof) * error
