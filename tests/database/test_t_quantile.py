"""The t quantile that seed spreads are judged with."""

from __future__ import annotations

import pytest

from common.t_quantile import t95


@pytest.mark.parametrize(
    ("dof", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042), (40, 2.0211), (60, 2.0003), (120, 1.9799)]
)
def test_published_points(dof: int, expected: float) -> None:
    assert t95(dof) == pytest.approx(expected, abs=5e-4)


def test_it_falls_towards_the_normal_quantile() -> None:
    values = [t95(dof) for dof in range(1, 400)]
    assert values == sorted(values, reverse=True)
    assert t95(10**9) == pytest.approx(1.959964)


@pytest.mark.parametrize("dof", [0, -1])
def test_one_measurement_has_no_spread(dof: int) -> None:
    with pytest.raises(ValueError, match="degree of freedom"):
        t95(dof)
