"""Power laws in the upper end of a spectrum, where there are enough singular values for one."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
LEAST_TAIL = 50
"""Values that a tail needs (clauset2009power, section 3: below, estimates are not reliable)."""
LEAST_P = 0.1
"""Below this p-value a power law is ruled out (clauset2009power, section 4)."""
STARTS = 50
"""Starts of the tail that are tried, evenly spaced."""


@dataclass(frozen=True)
class TailFit:
    """A power law ``density(λ) ∝ λ^(−exponent)`` of the largest λ = σ²; NaN with a `reason` where none is defined."""

    exponent: float
    low: float
    """Lower end of the interval of the exponent; `high` is the upper one."""
    high: float
    start: float
    """The smallest λ of the tail, in the units of σ²."""
    count: int
    """Values in the tail."""
    p: float
    """Probability that a true power law of this exponent fits worse."""
    reason: str
    """Why there is no exponent; empty where there is one."""


def tail_exponent(sigma: ArrayLike, *, level: float = 0.95, samples: int = 200, seed: int = 0) -> TailFit:
    """The exponent of the tail of one spectrum, from Hill's estimate above the start that fits best.

    The start has the smallest Kolmogorov–Smirnov distance (clauset2009power, equation 3.9), and `samples` synthetic
    spectra give the p-value of the fit. The interval is exact for independent λ above a given start. Singular values
    repel each other and the start is chosen: treat it as a rough one. A tail has at least 50 values, and p is at least
    0.1; otherwise the exponent is NaN. O(50 · samples · r).

    Raises:
        ValueError: a singular value is negative, infinite or NaN, or `level` is not between 0 and 1.

    >>> tail_exponent([3.0, 2.0, 1.0]).reason
    '3 singular values above rounding, 50 are needed'
    """
    from scipy import stats

    values = np.asarray(sigma, dtype=np.float64).ravel()
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values are finite and not negative")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, a number between 0 and 1 was expected")
    nan = float("nan")
    values = values[values > np.finfo(np.float32).eps * values.max(initial=0.0)]
    if len(values) < LEAST_TAIL:
        reason = f"{len(values)} singular values above rounding, {LEAST_TAIL} are needed"
        return TailFit(nan, nan, nan, nan, len(values), nan, reason)
    logs = np.sort(2 * np.log(values))[::-1]
    if np.ptp(logs) < 1e-6:  # float32 rounding of equal values
        return TailFit(nan, nan, nan, nan, len(values), nan, "all singular values are equal")
    (power,), (count,), (distance,) = _best_start(logs[None])
    start = logs[count - 1]
    p = _fit_p_value(logs, power, count, distance, samples, np.random.default_rng(seed))
    if p < LEAST_P:
        return TailFit(nan, nan, nan, float(np.exp(start)), int(count), p, f"a power law does not fit, p = {p:.2g}")
    total = (logs[: count - 1] - start).sum()
    low, high = stats.chi2.ppf([(1 - level) / 2, (1 + level) / 2], 2 * (count - 1)) / (2 * total)
    return TailFit(float(1 + power), float(1 + low), float(1 + high), float(np.exp(start)), int(count), p, "")


def _best_start(logs: Array) -> tuple[Array, NDArray[np.int64], Array]:
    """Power, number of tail values and distance (S,) of the best tail of spectra (S, N), logarithms descending."""
    size = logs.shape[1]
    best = np.full((3, len(logs)), np.inf)
    for count in np.unique(np.linspace(LEAST_TAIL, size, STARTS).astype(int)):
        above = logs[:, : count - 1] - logs[:, count - 1 : count]
        total = above.sum(1)
        power = (count - 1) / np.where(total > 0, total, np.inf)
        survival = np.exp(-power[:, None] * above)
        steps = np.arange(count) / (count - 1)
        distance = np.maximum(np.abs(survival - steps[1:]), np.abs(survival - steps[:-1])).max(1)
        found = np.stack([distance, power, np.full(len(logs), float(count))])
        best = np.where(distance < best[0], found, best)
    return best[1], best[2].astype(int), best[0]


def _fit_p_value(
    logs: Array, power: float, count: int, distance: float, samples: int, draw: np.random.Generator
) -> float:
    """The share of synthetic spectra that fit worse: the tail from the power law, the rest from the data."""
    size = len(logs)
    synthetic = logs[count - 1] + draw.exponential(1 / power, (samples, size))
    if size > count:
        body = draw.choice(logs[count:], (samples, size))
        synthetic = np.where(draw.random((samples, size)) < count / size, synthetic, body)
    _, _, distances = _best_start(np.sort(synthetic, axis=1)[:, ::-1])
    return float((1 + (distances >= distance).sum()) / (1 + samples))
