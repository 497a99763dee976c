"""Watches a running job from outside and says when to end it, by rules with names and numbers.

    nan        a reported loss is not finite
    diverged   the loss stands `monitor.diverge_nats` above its best, in two reports running
    leak       the mean loss of a column is below the best peer's by more than `monitor.leak_margin` of it and more than
               eight standard deviations of the peers there, in two columns running. (That a final loss more than 10 %
               below the baseline's is no candidate is the database's rule.)
    hopeless   from the curves of earlier runs, the held-out loss will end above the threshold of candidates with 97.5 %
               confidence (training/forecast.py), in two columns running after `monitor.hopeless_after` of the steps.
               One in ten (`monitor.hopeless_spared`), chosen by hash, is let through, and its record says so: so the
               share of runs that would have been ended wrongly is measured
    slow       CPU seconds a step are `monitor.slow_factor` times the median of the peers'
    stalled    no report for `monitor.stall_seconds`

CPU seconds are read by the host, so a program cannot hide its cost, and a busy machine does not make it slow.
On a GPU they are those of the process that drives it, which misses what the card does meanwhile: there the limits on
wall time have to do. `timeout` and `memory` are limits of the sandbox and end a run there; out of memory, it is tried
once more with half the micro-batch (training/run.py). The training loss that the rules read is the worker's own word:
a program that forges it gains nothing, since only the held-out loss, computed by the scorer, is scored.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from common.knobs import Monitor as MonitorSettings
from common.records import Forecast, Reason, RunRecord
from training.forecast import forecast

__all__ = ["Monitor", "Peer", "Stop", "peer_of"]

LEAST_SHARE = 0.1
"""Share of the steps before which leak is not judged: all curves start alike."""
LEAK_SDS = 8
LEAST_STEPS, LEAST_CPU_SECONDS = 20, 3.0
"""What a run must have used before it can be called slow."""


@dataclass(frozen=True)
class Peer:
    """An earlier finished run of the same profile on the same kind of device.

    Attributes:
        curve: step -> mean training loss since the step before it.
        cpu_seconds_per_step: of training, read by the host.
        heldout: its held-out loss.
    """

    curve: Mapping[int, float]
    cpu_seconds_per_step: float | None = None
    heldout: float | None = None


@dataclass(frozen=True)
class Stop:
    """The verdict that a run should end. `reason` goes into its record."""

    reason: Reason
    detail: str


def peer_of(record: RunRecord) -> Peer:
    """A finished run as a peer of later ones."""
    steps = max(map(int, record.train_loss), default=0)
    seconds = record.seconds.get("train_cpu")
    return Peer(
        curve={int(step): loss for step, loss in record.train_loss.items()},
        cpu_seconds_per_step=seconds / steps if seconds and steps else None,
        heldout=record.heldout_loss.value if record.heldout_loss else None,
    )


@dataclass
class Monitor:
    """The rules over one run. Feed it every report and call `tick` at least once a second; the first verdict stands.

    Args:
        steps: of the whole run.
        clock: seconds, for `stalled`.
        threshold: held-out loss above which a run is no candidate; None: no run is hopeless.
        spared: a run that is found hopeless goes on.
        warm_up: seconds more that may pass before the first report.

    Attributes:
        forecast: why the run was found hopeless, spared or not; None while it was not.
    """

    settings: MonitorSettings
    steps: int
    peers: Sequence[Peer] = ()
    clock: Callable[[], float] = time.monotonic
    threshold: float | None = None
    spared: bool = False
    warm_up: float = 0.0
    forecast: Forecast | None = None
    _best: float | None = None
    _high: int = 0
    _low: int = 0
    _bad: int = 0
    _window: list[tuple[int, float]] = field(default_factory=list)
    _previous: int = 0
    _first: tuple[int, float] | None = None
    _heard: float | None = None
    _reported: bool = False

    def started(self) -> None:
        """Training begins now: from here on silence counts."""
        self._heard = self.clock()

    def finished(self) -> None:
        """Training has ended: silence no longer counts."""
        self._heard = None

    def report(self, step: int, loss: float | None, cpu_seconds: float | None) -> Stop | None:
        """One report of the run: mean loss since the last one, and the CPU seconds used so far."""
        self._heard, self._reported = self.clock(), True
        if loss is None:
            return Stop("nan", f"the loss was not finite at step {step}")
        mean = self._column(step, loss)
        stop = self._diverged(step, loss)
        if stop is None and mean is not None:
            stop = self._leak(step, mean) or self._hopeless(step, mean)
        return stop or self._slow(step, cpu_seconds)

    def tick(self) -> Stop | None:
        """Time has passed without a report."""
        if self._heard is None:
            return None
        silent = self.clock() - self._heard
        allowed = self.settings.stall_seconds + (0.0 if self._reported else self.warm_up)
        if silent > allowed:
            return Stop("stalled", f"no report for {silent:.0f} s, the limit is {allowed:g} s")
        return None

    def _diverged(self, step: int, loss: float) -> Stop | None:
        if self._best is None or loss < self._best:
            self._best = loss
        self._high = self._high + 1 if loss > self._best + self.settings.diverge_nats else 0
        if self._high < 2:
            return None
        return Stop(
            "diverged",
            f"the loss was {loss:.3f} at step {step}, {loss - self._best:.2f} above its best {self._best:.3f}; "
            f"the limit is {self.settings.diverge_nats:g}",
        )

    def _column(self, step: int, loss: float) -> float | None:
        """Mean loss since the last column, where a column of the peers ends at `step`."""
        self._window.append((step - self._previous, loss))
        self._previous = step
        if not any(step in peer.curve for peer in self.peers):
            return None
        mean = sum(weight * value for weight, value in self._window) / sum(weight for weight, _ in self._window)
        self._window.clear()
        return mean

    def _leak(self, step: int, mean: float) -> Stop | None:
        if step < LEAST_SHARE * self.steps:
            return None
        rivals = [peer.curve[step] for peer in self.peers if step in peer.curve]
        spread = LEAK_SDS * statistics.stdev(rivals) if len(rivals) > 2 else 0.0
        margin = max(self.settings.leak_margin * min(rivals), spread)
        self._low = self._low + 1 if mean < min(rivals) - margin else 0
        if self._low < 2:
            return None
        return Stop(
            "leak",
            f"the mean loss to step {step} was {mean:.3f}, the best of {len(rivals)} peers had {min(rivals):.3f} "
            f"there; more than {margin:.2f} below it is taken for seeing the future",
        )

    def _hopeless(self, step: int, mean: float) -> Stop | None:
        if self.threshold is None or self.forecast is not None or step < self.settings.hopeless_after * self.steps:
            return None
        known = [
            (peer.curve[step], peer.heldout) for peer in self.peers if step in peer.curve and peer.heldout is not None
        ]
        found = forecast(mean, known)
        self._bad = self._bad + 1 if found is not None and found[1] > self.threshold else 0
        if found is None or self._bad < 2:
            return None
        self.forecast = Forecast(
            step=step, loss=mean, predicted=found[0], low=found[1], threshold=self.threshold, peers=len(known),
            spared=self.spared,
        )  # fmt: skip
        if self.spared or step >= self.steps:
            return None
        return Stop(
            "hopeless",
            f"the mean loss to step {step} was {mean:.3f}; by {len(known)} earlier runs it would end at {found[0]:.3f} "
            f"(97.5 %: above {found[1]:.3f}), candidates end below {self.threshold:.3f}",
        )

    def _slow(self, step: int, cpu_seconds: float | None) -> Stop | None:
        if cpu_seconds is None:
            return None
        if self._first is None:
            self._first = step, cpu_seconds
            return None
        steps, used = step - self._first[0], cpu_seconds - self._first[1]
        rates = [peer.cpu_seconds_per_step for peer in self.peers if peer.cpu_seconds_per_step]
        if not rates or steps < min(LEAST_STEPS, self.steps // 4) or used < LEAST_CPU_SECONDS:
            return None
        median = statistics.median(rates)
        if used / steps <= self.settings.slow_factor * median:
            return None
        return Stop(
            "slow",
            f"{used / steps:.3f} CPU seconds a step at step {step}, {used / steps / median:.1f} times the median "
            f"{median:.3f} of {len(rates)} peers; the limit is {self.settings.slow_factor:g} times",
        )
