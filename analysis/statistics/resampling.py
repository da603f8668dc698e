"""Bootstrap intervals over seeds, and a permutation test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def bootstrap_interval(
    values: ArrayLike,
    *,
    statistic: Callable[..., ArrayLike] = np.mean,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (efron1987better) of a statistic of independent values.

    With fewer than three values there is no interval, NaN; with equal values it has no width. `statistic` takes
    ``axis``, and does not depend on the order of its values. With few seeds it is too short: five seeds give about 0.85
    for a level of 0.95.

    Where no left-out value changes the statistic, such as the median of 1, 2, 2, 2, 3, the acceleration is not defined:
    the interval is then the range between quantiles of the resamples.

    Raises:
        ValueError: level is not between 0 and 1, or a value is NaN or infinite.

    >>> bootstrap_interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    given = np.asarray(values, dtype=np.float64).ravel()
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, a number between 0 and 1 was expected")
    if not np.isfinite(given).all():
        odd = "NaN" if np.isnan(given).any() else "infinity"
        raise ValueError(f"values contain {odd}: leave those seeds out, and say so")
    if len(given) < 3:
        return float("nan"), float("nan")

    def of_multiset(sample: Array, axis: int) -> Array:  # equal resamples tie, whatever the order of their sum
        return np.asarray(statistic(np.sort(sample, axis=axis), axis=axis), dtype=np.float64)

    rounding = 64 * np.finfo(np.float64).eps * np.abs(given).max()
    centre = float(of_multiset(given, axis=-1))
    if np.ptp(given) <= rounding:
        return centre, centre
    from scipy import stats  # here: importing it takes a second

    without_one = of_multiset(np.array([np.delete(given, index) for index in range(len(given))]), axis=-1)
    changes = float(np.ptp(without_one))
    _, exponent = np.frexp(changes)  # cubes of the changes would under- or overflow; a power of two keeps all digits

    def from_centre(sample: Array, axis: int) -> Array:  # values that tie with the centre but for rounding do tie
        distance = of_multiset(sample, axis) - centre
        values: Array = np.ldexp(np.where(np.abs(distance) <= rounding, 0.0, distance), -exponent)
        return values

    bootstrap: Any = stats.bootstrap
    rng = np.random.default_rng(seed)
    method = "BCa" if changes else "percentile"
    options = {"confidence_level": level, "n_resamples": samples, "rng": rng, "method": method, "axis": -1}
    ends = bootstrap((given,), from_centre, **options).confidence_interval
    low, high = (centre + float(np.ldexp(end, exponent)) for end in ends)
    return low, high


def over_seeds(
    tables: Sequence[pd.DataFrame], *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """One tidy table from those of several seeds: the mean value, with ci_low, ci_high and the number of seeds.

    Rows are matched by every column that is not a number computed from the run. A value that is infinite in a run, as a
    condition number may be, has an infinite mean and no interval.

    Raises:
        ValueError: fewer than two tables, or tables with different rows.
    """
    if len(tables) < 2:
        raise ValueError(f"got {len(tables)} tables: an interval over seeds needs at least two runs")
    computed = {"value", "chance", "chance_std", "chance_shape", "ci_low", "ci_high", "z", "p", "p_holm"}
    keys = [column for column in tables[0].columns if column not in computed]
    merged = pd.concat(tables, ignore_index=True)
    grouped = merged.groupby(keys, sort=False, dropna=False)["value"]
    if (grouped.size() != len(tables)).any():
        odd = grouped.size()[grouped.size() != len(tables)].index[0]
        raise ValueError(f"the tables differ in their rows: {odd} is not in each of them once")
    rows = []
    for key, values in grouped:
        known = values.dropna()
        finite = bool(np.isfinite(known).all())
        low, high = bootstrap_interval(known if finite else (), level=level, samples=samples, seed=seed)
        rows.append((*(key if isinstance(key, tuple) else (key,)), values.mean(), low, high, int(values.count())))
    return pd.DataFrame(rows, columns=[*keys, "value", "ci_low", "ci_high", "seeds"])


@dataclass(frozen=True)
class PermutationTest:
    """A correlation, and its distribution when the pairing is shuffled."""

    statistic: float
    p_value: float
    low: float
    """2.5 % quantile of the statistic when the pairing is shuffled; ``high`` is the 97.5 % quantile."""
    high: float
    count: int
    samples: int


def permutation_test(
    imbalance: ArrayLike,
    forgetting: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    method: Literal["spearman", "pearson"] = "spearman",
    samples: int = 10_000,
    seed: int = 0,
) -> PermutationTest:
    """Two-sided permutation test of "imbalance predicts forgetting".

    The pairing is shuffled within each of `groups`, such as seeds: docs/analysis.md, "Several runs". The statistic is
    the correlation of values (ranks, for ``"spearman"``) less the mean of their group; p is never zero.

    Raises:
        ValueError: lengths differ, fewer than four pairs, NaN, a quantity without variation, or an infinite value,
            which only ranks allow.

    >>> permutation_test(range(8), range(8), samples=999).statistic
    1.0
    """
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (imbalance, forgetting))
    labels = np.zeros(len(x), dtype=int) if groups is None else np.asarray(groups).ravel()
    if not len(x) == len(y) == len(labels):
        raise ValueError(f"lengths differ: {len(x)} and {len(y)} values, {len(labels)} groups")
    if len(x) < 4 or np.isnan(x).any() or np.isnan(y).any():
        raise ValueError(f"a permutation test needs at least four pairs without NaN, got {len(x)} pairs")
    if method not in ("spearman", "pearson"):
        raise ValueError(f"method is {method!r}, choose 'spearman' or 'pearson'")
    if method == "pearson" and not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a value is infinite, which has no Pearson correlation: choose method='spearman'")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    x, y = (_centred(values, members, ranks=method == "spearman") for values in (x, y))
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    if scale == 0:
        raise ValueError("imbalance or forgetting does not vary within any group: nothing to test")
    draw = np.random.default_rng(seed)
    shuffled = np.empty(samples)
    for position in range(samples):
        mixed = y.copy()
        for group in members:
            mixed[group] = y[draw.permutation(group)]
        shuffled[position] = x @ mixed / scale
    statistic = float(np.clip(x @ y / scale, -1.0, 1.0))
    extreme = int((np.abs(shuffled) >= abs(statistic) - 1e-12).sum())  # ties count, whatever their rounding
    low, high = np.quantile(shuffled, [0.025, 0.975])
    return PermutationTest(statistic, (1 + extreme) / (1 + samples), float(low), float(high), len(x), samples)


def _centred(values: Array, members: Sequence[NDArray[np.int64]], *, ranks: bool) -> Array:
    """Values, or their ranks, within each group and less its mean."""
    left = np.empty_like(values)
    for group in members:
        part = pd.Series(values[group]).rank().to_numpy() if ranks else values[group]
        left[group] = part - part.mean()
    return left
