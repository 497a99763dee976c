"""The monitor: each rule fires on what it is for, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.knobs import Monitor as MonitorSettings
from common.records import RunRecord
from training.forecast import FEWEST, forecast
from training.monitor import Monitor, Peer, Stop, peer_of

CURVE = {1: 6.9, 50: 6.0, 100: 5.5, 150: 5.2, 200: 5.0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def feed(monitor: Monitor, losses: dict[int, float | None], cpu_per_step: float = 0.02) -> Stop | None:
    for step, loss in losses.items():
        stop = monitor.report(step, loss, cpu_per_step * step)
        if stop is not None:
            return stop
    return None


def watching(*peers: Peer, **changes: float) -> Monitor:
    return Monitor(MonitorSettings(**changes), 200, peers, Clock())


def test_an_ordinary_run_is_left_alone() -> None:
    peer = Peer(CURVE, 0.02)
    better = {step: loss * 0.95 for step, loss in CURVE.items()}
    assert feed(watching(peer), {**better}, 0.05) is None


def test_the_first_report_may_take_longer_where_kernels_are_compiled() -> None:
    monitor = watching(stall_seconds=100.0)
    monitor.warm_up = 900.0
    clock = monitor.clock
    assert isinstance(clock, Clock)
    monitor.started()
    clock.now = 999.0
    assert monitor.tick() is None and monitor.report(1, 6.9, 1.0) is None
    clock.now += 101.0
    stop = monitor.tick()
    assert stop is not None and stop.reason == "stalled"


def test_nan() -> None:
    stop = feed(watching(), {1: 6.9, 10: None})
    assert stop is not None and stop.reason == "nan" and "step 10" in stop.detail


def test_diverged_needs_two_reports() -> None:
    assert feed(watching(), {1: 6.0, 10: 5.0, 20: 7.5, 30: 5.0}) is None
    stop = feed(watching(), {1: 6.0, 10: 5.0, 20: 7.5, 30: 7.2})
    assert stop is not None and stop.reason == "diverged" and "2.20 above" in stop.detail


def test_leak_is_a_loss_far_below_every_peer() -> None:
    peers = Peer(CURVE), Peer({step: loss * 1.1 for step, loss in CURVE.items()})
    low = {step: loss * (0.7 if step >= 50 else 1.0) for step, loss in CURVE.items()}
    stop = feed(watching(*peers), low)
    assert stop is not None and stop.reason == "leak" and "step 100" in stop.detail
    once = {**CURVE, 100: CURVE[100] * 0.6}
    assert feed(watching(*peers), once) is None
    assert feed(watching(*peers, leak_margin=0.4), low) is None
    assert feed(watching(), low) is None, "without peers there is nothing to compare with"


def test_leak_compares_means_over_the_same_steps() -> None:
    reports: dict[int, float | None] = {1: 6.9}
    for column in (50, 100, 150, 200):
        # Single reports far below, balanced by others: the column's mean is that of the peer.
        reports[column - 25], reports[column] = CURVE[column] * 0.5, CURVE[column] * 1.5
    assert feed(watching(Peer(CURVE), diverge_nats=50), reports) is None


def test_slow_is_measured_against_the_median_of_peers() -> None:
    peers = [Peer(CURVE, rate) for rate in (0.01, 0.1, 5.0)] + [Peer(CURVE, None)]
    assert feed(watching(*peers), dict.fromkeys(range(1, 200, 10), 6.0), 0.29) is None
    stop = feed(watching(*peers), dict.fromkeys(range(1, 200, 10), 6.0), 0.31)
    assert stop is not None and stop.reason == "slow" and "3 peers" in stop.detail


def test_a_run_is_not_called_slow_for_its_first_seconds() -> None:
    assert feed(watching(Peer(CURVE, 0.001)), {1: 6.9, 10: 6.8}, 0.2) is None


def curves(count: int) -> list[Peer]:
    """Peers whose held-out loss follows their curve: 0.9 of it at step 100, give or take 0.01."""
    scales = [0.9 + 0.02 * number for number in range(count)]
    return [
        Peer({step: loss * scale for step, loss in CURVE.items()}, None, 4.95 * scale + 0.01 * (-1) ** number)
        for number, scale in enumerate(scales)
    ]


def judge(
    scale: float, peers: int = 12, threshold: float | None = 5.5, spared: bool = False
) -> tuple[Stop | None, Monitor]:
    monitor = Monitor(MonitorSettings(), 200, curves(peers), Clock(), threshold, spared)
    return feed(monitor, {step: loss * scale for step, loss in CURVE.items()}), monitor


def test_hopeless_is_a_run_whose_end_earlier_runs_tell() -> None:
    stop, monitor = judge(1.25)
    assert (
        stop is not None
        and stop.reason == "hopeless"
        and "12 earlier runs" in stop.detail
        and "step 150" in stop.detail
    )
    assert monitor.forecast is not None and monitor.forecast.predicted == pytest.approx(4.95 * 1.25, abs=0.05)
    assert 5.5 < monitor.forecast.low < monitor.forecast.predicted
    assert judge(1.0)[0] is None and judge(1.1)[0] is None, "near the threshold it may still become a candidate"
    assert judge(1.25, peers=5)[0] is None and judge(1.25, threshold=None)[0] is None


def test_a_spared_run_goes_on_and_is_known() -> None:
    stop, monitor = judge(1.25, spared=True)
    assert stop is None and monitor.forecast is not None and monitor.forecast.spared


@given(st.lists(st.tuples(st.floats(3, 7), st.floats(3, 7)), max_size=12), st.floats(3, 7))
def test_a_forecast_is_never_surer_than_its_peers(peers: list[tuple[float, float]], here: float) -> None:
    found = forecast(here, peers)
    assert (found is None) == (len(peers) < FEWEST or len({loss for loss, _ in peers}) == 1)
    if found is not None:
        assert found[1] <= found[0] + 1e-9


def test_a_forecast_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    low = 0
    for _ in range(2000):
        losses = random.normal(5, 0.3, 9)
        ends = 0.8 * losses + random.normal(0, 0.1, 9)
        found = forecast(losses[0], list(zip(losses[1:], ends[1:], strict=True)))
        assert found is not None
        low += ends[0] < found[1]
    assert 0.015 < low / 2000 < 0.035


def test_stalled() -> None:
    monitor = watching(stall_seconds=10)
    clock = monitor.clock
    assert isinstance(clock, Clock)
    clock.now = 1000
    assert monitor.tick() is None, "before training begins silence is no fault"
    monitor.started()
    clock.now += 9
    assert monitor.tick() is None
    assert monitor.report(1, 6.0, None) is None
    clock.now += 10.5
    stop = monitor.tick()
    assert stop is not None and stop.reason == "stalled"
    monitor.finished()
    assert monitor.tick() is None


@given(st.lists(st.floats(0.9, 1.1), min_size=5, max_size=5), st.floats(0.5, 1.5))
def test_runs_within_the_noise_of_a_peer_are_never_stopped(noise: list[float], cost: float) -> None:
    losses: dict[int, float | None] = {
        step: loss * max(factor, 0.91) for (step, loss), factor in zip(CURVE.items(), noise, strict=True)
    }
    assert feed(watching(Peer(CURVE, 0.05)), losses, 0.05 * cost) is None


def test_a_record_becomes_a_peer() -> None:
    record = RunRecord(
        run_id="r", name="n", profile="tiny", seed=0, status="finished", program_sha256="p", baseline_key="k",
        train_loss={"1": 6.0, "100": 5.0}, seconds={"train_cpu": 4.0},
    )  # fmt: skip
    peer = peer_of(record)
    assert peer.curve == {1: 6.0, 100: 5.0} and peer.cpu_seconds_per_step == pytest.approx(0.04)
    assert peer_of(record.model_copy(update={"seconds": {}})).cpu_seconds_per_step is None
