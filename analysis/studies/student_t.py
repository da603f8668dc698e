"""Means over a few runs: Student's intervals, paired t tests and sign-flip tests, NaN if there are too few values."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]
FLIPS = 9999
"""Choices of signs, if there are more in all."""
ROUNDING = 64 * float(np.finfo(np.float64).eps)
"""Values closer than this, relative to their size, differ by rounding only."""


class MeanInterval(NamedTuple):
    """A mean with its spread and confidence interval."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """A mean difference with its confidence interval, and two tests that it is zero: Student's and by flipped signs."""

    n: int
    difference: float
    low: float
    high: float
    t: float
    p: float
    p_flip: float


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> MeanInterval:
    """The mean of independent values, ``± t sd / √n`` with t the quantile of Student's law with n − 1 degrees.

    A NaN is an unknown value and does not count. One value gives a mean without spread and interval, no value gives
    NaN. ValueError if level is not between 0 and 1.

    >>> round(mean_interval([1.0, 3.0], level=0.5).high, 6)  # sd √2, and t is 1 for one degree of freedom
    3.0
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, a number between 0 and 1 was expected")
    known = np.asarray(values, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    n = len(known)
    if not n:
        return MeanInterval(0, *[float("nan")] * 4)
    mean = float(known.mean())
    if n == 1:
        return MeanInterval(1, mean, *[float("nan")] * 3)
    sd = 0.0 if _equal(known, float(np.abs(known).max())) else float(known.std(ddof=1))
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * sd / n**0.5
    return MeanInterval(n, mean, sd, mean - half, mean + half)


def paired_test(values: ArrayLike, reference: ArrayLike, *, level: float = 0.95) -> PairedTest:
    """The mean of ``values − reference``, pair by pair, and the two-sided tests that it is zero.

    `p` is that of the t test, `p_flip` that of the sign-flip test, which assumes of the differences only that they are
    symmetric about zero: the share of all choices of their signs with a mean at least as large, exact up to 13 pairs,
    else of 9999 random choices. With n pairs it is at least ``2 / 2ⁿ``.

    A pair with a NaN does not count. With fewer than two pairs both are NaN, and with equal differences p is: there is
    no spread to compare the mean with. ValueError if the lengths differ, or level is not between 0 and 1.

    >>> test = paired_test([3.0, 5.0], [2.0, 2.0])  # differences 1 and 3: mean 2, sd √2
    >>> test.t, test.p_flip  # of the means 2, 1, −1, −2 two are as large
    (2.0, 0.5)
    """
    first, second = (np.asarray(given, dtype=np.float64).ravel() for given in (values, reference))
    if len(first) != len(second):
        raise ValueError(f"lengths differ: {len(first)} values, {len(second)} of the reference")
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    n, mean, sd, low, high = mean_interval(first - second, level=level)
    untested = PairedTest(n, mean, low, high, float("nan"), float("nan"), float("nan"))
    if n < 2:
        return untested
    # relative to the size of both values, whose rounding the differences carry
    size = float(max(np.abs(first).max(), np.abs(second).max()))
    untested = untested._replace(p_flip=_sign_flip(first - second, ROUNDING * size))
    if _equal(first - second, size):
        return untested._replace(low=mean, high=mean)
    t = mean / (sd / n**0.5)
    return untested._replace(t=t, p=float(2 * special.stdtr(n - 1, -abs(t))))


def _sign_flip(differences: Array, rounding: float) -> float:
    """The share of choices of signs with a mean as large; means closer than `rounding` tie, as they do on paper."""
    n = len(differences)
    exact = 2**n <= FLIPS
    if exact:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], size=(FLIPS, n))
    extreme = int((np.abs((signs * differences).mean(axis=1)) >= abs(differences.mean()) - rounding).sum())
    return extreme / 2**n if exact else (1 + extreme) / (1 + FLIPS)


def _equal(values: Array, size: float) -> bool:
    return bool(np.ptp(values) <= ROUNDING * size)
