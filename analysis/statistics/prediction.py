"""Intervals for the share that new data would give, by resampling groups of data twice."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
LEAST_GROUPS = 8
"""Groups of examples below which a resampled interval is too short to be given."""


def share_prediction(
    part: ArrayLike, total: ArrayLike, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Shares ``Σ_g part / Σ_g total`` (k,), and lower and upper ends for as many new groups of the same kind.

    Groups are drawn with replacement, once for the given data and once for the new. The interval holds the share times
    the factors between the two: it is wider than a confidence interval, since new data vary too. Widths are enlarged
    from a normal to a Student quantile, as resampled intervals of few groups are too short (hesterberg2015bootstrap).

    Args:
        part: (groups, k), not negative; several parts share the draws.
        total: (groups,), positive.
        level: probability that the share on new data lies in the interval.
        samples: pairs of draws.
        seed: of the draws.

    Raises:
        ValueError: fewer than 8 groups, or a level outside (0, 1).

    >>> share_prediction([[1.0]] * 9, [4.0] * 9)  # equal groups: nothing varies
    (array([0.25]), array([0.25]), array([0.25]))
    """
    parts, totals = np.asarray(part, dtype=np.float64), np.asarray(total, dtype=np.float64)
    groups = len(totals)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, a number between 0 and 1 was expected")
    if groups < LEAST_GROUPS:
        raise ValueError(
            f"{groups} groups of examples are too few for an interval: at least {LEAST_GROUPS} are needed, give more "
            "examples"
        )
    share = np.clip(parts.sum(0) / totals.sum(), 0.0, 1.0)
    draw = np.random.default_rng(seed)
    logs = []
    for _ in range(2):
        counts = draw.multinomial(groups, np.full(groups, 1 / groups), size=samples).astype(np.float64)
        drawn = (counts @ parts) / (counts @ totals)[:, None]
        logs.append(np.log(np.maximum(drawn, np.finfo(np.float64).tiny)))
    few = _student_factor(parts - share * totals[:, None], level)
    width = np.quantile(np.abs(logs[1] - logs[0]), level, axis=0) * few
    known = share > 0
    factor = np.where(known, np.exp(np.minimum(width, 700.0)), 1.0)
    return share, share / factor, np.minimum(share * factor, 1.0)


def _student_factor(influences: Array, level: float) -> Array:
    """Student's over the normal quantile (k,), for variances estimated from values (groups, k) with heavy tails.

    An estimated variance of n values with excess kurtosis κ has the relative variance ``κ / n + 2 / (n − 1)``, that of
    a chi-square with ``2 / (κ / n + 2 / (n − 1))`` degrees of freedom.
    """
    n = len(influences)
    centred = influences - influences.mean(0)
    variance = (centred**2).mean(0)
    fourth = (centred**4).mean(0)
    kurtosis = np.where(variance > 0, fourth / np.where(variance > 0, variance, 1.0) ** 2 - 3.0, 0.0)
    freedom = 2.0 / (np.maximum(kurtosis, 0.0) / n + 2.0 / (n - 1))
    quantiles = stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2)
    return np.asarray(quantiles * (n / (n - 1)) ** 0.5)
