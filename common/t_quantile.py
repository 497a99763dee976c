"""Student's t quantile: how wide a 95 % interval is when the spread was measured on a few seeds only."""

from __future__ import annotations

__all__ = ["t95"]

# Two-sided 95 % points (the 0.975 quantile) of Student's t distribution for 1 to 30 degrees of freedom: the standard
# table, as in the NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2; scipy.stats.t.ppf(0.975, dof)
# gives the same numbers. A table, because importing scipy.stats for thirty constants takes longer than using them.
_TABLE = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.959964


def t95(dof: int) -> float:
    """The t with P(|T| <= t) = 0.95 at `dof` degrees of freedom; n measurements of one spread leave n - 1.

    Above 30 the first terms of the expansion in 1 / dof (Abramowitz and Stegun 26.7.5), right to 0.0005.

    Raises:
        ValueError: `dof` is below 1: one measurement says nothing of its spread.
    """
    if dof < 1:
        raise ValueError(f"expected at least 1 degree of freedom, got {dof}: a spread takes two measurements")
    if dof <= len(_TABLE):
        return _TABLE[dof - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
