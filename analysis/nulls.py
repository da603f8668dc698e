"""What chance would do: random subspaces and frames, corrections for many layers, resampling over seeds.

A small overlap looks small by construction: two random subspaces of dimensions a and b in R^n share ``ab / n``
squared cosines on average. Everything here says how far a number is from that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
TWO_SIDED = ("alignment",)


@dataclass(frozen=True)
class OverlapNull:
    """The law of ``‖V_aᵀ V_b‖² / min(a, b)`` for uniformly random subspaces of dimensions a and b in R^n.

    >>> null = OverlapNull(n=100, a=4, b=8)
    >>> null.mean, round(null.std, 6)
    (0.08, 0.018704)
    """

    n: int
    a: int
    b: int

    def __post_init__(self) -> None:
        """Check the dimensions."""
        if not (1 <= self.a <= self.n and 1 <= self.b <= self.n):
            raise ValueError(f"dimensions {self.a} and {self.b} must lie between 1 and n = {self.n}")

    @property
    def mean(self) -> float:
        """``max(a, b) / n``."""
        return max(self.a, self.b) / self.n

    @property
    def variance(self) -> float:
        """``2 a b (n − a)(n − b) / (n² (n − 1)(n + 2) min(a, b)²)``."""
        n, a, b = self.n, self.a, self.b
        whole = 2 * a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1) * (n + 2))
        return whole / min(a, b) ** 2

    @property
    def std(self) -> float:
        """Root of the variance."""
        return float(np.sqrt(self.variance))

    @property
    def exact(self) -> bool:
        """Whether `quantile` and `p_value` are exact: one of the subspaces, or a complement, is a line."""
        return min(self.a, self.b, self.n - self.a, self.n - self.b) <= 1

    def quantile(self, q: ArrayLike) -> Array:
        """Quantiles from the beta law of this mean and variance, shifted by what must overlap; see `exact`."""
        low, law = self._law()
        if law is None:
            return np.full(np.shape(q), low)
        return np.asarray(low + (1 - low) * law.ppf(q))

    def p_value(self, overlap: ArrayLike) -> Array:
        """Probability of at least this overlap."""
        low, law = self._law()
        values = np.asarray(overlap, dtype=np.float64)
        if law is None:
            return np.where(values <= low, 1.0, 0.0)
        return np.asarray(law.sf((values - low) / (1 - low)))

    def sample(self, count: int, *, seed: int = 0) -> Array:
        """Independent draws; O(min(a, b)³) each, whatever n is."""
        cosines = random_cosines(self.n, self.a, self.b, count, draw=np.random.default_rng(seed))
        return np.asarray((cosines**2).sum(-1) / min(self.a, self.b))

    def _law(self) -> tuple[float, Any]:
        least = min(self.a, self.b)
        low = max(0, self.a + self.b - self.n) / least  # in R^n, planes of dimensions a and b meet in a + b − n
        return low, beta_law((self.mean - low) / (1 - low), self.variance / (1 - low) ** 2) if low < 1 else None


def beta_law(mean: float, variance: float) -> Any:
    """The beta law of this mean and variance, or None when there is no spread."""
    if not (0 < mean < 1 and variance > 0):
        return None
    strength = mean * (1 - mean) / variance - 1
    return stats.beta(mean * strength, (1 - mean) * strength)


def random_block(n: int, a: int, b: int, count: int, *, draw: np.random.Generator) -> Array:
    """Draws (count, a, b) of ``V_aᵀ V_b`` for a fixed a-frame and a random b-frame in R^n, a + b ≤ n.

    The first a rows of a random b-frame are ``G R⁻¹`` with G Gaussian (a, b) and ``RᵀR = GᵀG + S``; S, the Gram
    matrix of the other n − a rows, is drawn as a Wishart matrix by Bartlett's triangle. O(b³) a draw for any n.
    """
    if a + b > n:
        raise ValueError(f"a + b = {a + b} is larger than n = {n}: take the complements")
    g = draw.standard_normal((count, a, b))
    triangle = np.triu(draw.standard_normal((count, b, b)), 1)
    triangle += np.sqrt(draw.chisquare(n - a - np.arange(b), (count, b)))[..., None] * np.eye(b)
    gram = np.swapaxes(g, -1, -2) @ g + np.swapaxes(triangle, -1, -2) @ triangle
    lower = np.linalg.cholesky(gram)
    return np.asarray(np.swapaxes(np.linalg.solve(lower, np.swapaxes(g, -1, -2)), -1, -2))


def random_cosines(n: int, a: int, b: int, count: int, *, draw: np.random.Generator) -> Array:
    """Cosines (count, min(a, b)) of the principal angles of random subspaces in R^n, descending."""
    if a + b > n:  # directions that must be common; the other angles are those of the complements
        few = min(n - a, n - b)
        inner = random_cosines(n, n - a, n - b, count, draw=draw) if few else np.empty((count, 0))
        return np.concatenate([np.ones((count, min(a, b) - few)), inner], axis=1)
    block = random_block(n, max(a, b), min(a, b), count, draw=draw)
    return np.asarray(np.minimum(np.linalg.svd(block, compute_uv=False), 1.0))


def angle_band(
    n: int, a: int, b: int, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Low, median and high principal angles (radians, ascending) of random subspaces, by Monte Carlo."""
    angles = np.arccos(random_cosines(n, a, b, samples, draw=np.random.default_rng(seed)))
    tail = (1 - level) / 2
    low, middle, high = np.quantile(angles, [tail, 0.5, 1 - tail], axis=0)
    return low, middle, high


def alignment_p_value(z: ArrayLike, shape: ArrayLike) -> Array:
    """Two-sided probability of a cosine at least ``|z|`` standard deviations from 0, for random frames.

    A cosine of updates is ``Σ_ij s_i t_j X_ij Y_ij``, with blocks X and Y of random orthogonal matrices. Given X
    it is normal for a large n, with variance ``Σ s_i² t_j² X_ij²``, here a gamma law of the same mean and
    variance: shape ``1 / (2 Σp_a² Σp_b²)``, which is exact for rank one and tends to a normal cosine when the
    energy is spread.

    >>> round(float(alignment_p_value(1.959964, 1e9)), 4)  # a normal number
    0.05
    """
    distance, k = np.broadcast_arrays(np.abs(np.asarray(z, dtype=np.float64)), np.asarray(shape, dtype=np.float64))
    distance, k = distance[..., None], k[..., None]
    # The trapezoidal rule over the logarithm of the variance, up to where the gamma density is below e^-30.
    grid = np.linspace(-1.0, 1.0, 2001)
    reach = np.where(grid < 0, np.maximum(12 / np.sqrt(k), 30 / k), np.minimum(12 / np.sqrt(k), 6.0))
    logs = np.broadcast_to(grid, reach.shape) * reach
    density = np.exp(k * (logs - np.expm1(logs)))
    tail = 2 * stats.norm.sf(distance * np.exp(-logs / 2))
    return np.asarray(np.trapezoid(density * tail, logs, axis=-1) / np.trapezoid(density, logs, axis=-1))


def holm(p_values: ArrayLike) -> Array:
    """Holm's adjusted p-values: comparing them with α keeps the chance of any false alarm below α.

    NaN stays NaN and does not count as a test.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, dtype=np.float64).ravel()
    adjusted = np.full_like(given, np.nan)
    known = np.flatnonzero(~np.isnan(given))
    if (given[known] < 0).any() or (given[known] > 1).any():
        raise ValueError("p-values lie between 0 and 1")
    order = known[np.argsort(given[known], kind="stable")]
    steps = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def against_chance(interference: pd.DataFrame) -> pd.DataFrame:
    """The rows of an interference table that have a null law, with z, p and p_holm.

    ``z`` = (value − chance) / chance_std. ``p`` is the probability of at least this value for frames drawn
    uniformly at random with the same spectra: from the beta law of the null's mean and variance for overlap,
    backward and leakage (exact when a subspace is a line), two-sided from `alignment_p_value` for alignment.
    ``p_holm`` is corrected over the layers of a metric and a pair of tasks; a total is one test.
    """
    table = interference[interference["chance_std"].notna() & interference["value"].notna()].copy()
    spread = table["chance_std"].where(table["chance_std"] > 0)
    table["z"] = (table["value"] - table["chance"]) / spread
    table["p"] = np.nan
    for metric, rows in table.groupby("metric", sort=False).groups.items():
        chosen = table.loc[rows]
        if metric in TWO_SIDED:
            table.loc[rows, "p"] = alignment_p_value(chosen["z"], chosen["chance_shape"])
            continue
        mean, variance = chosen["chance"].to_numpy(), chosen["chance_std"].to_numpy() ** 2
        inside = (variance > 0) & (mean > 0) & (mean < 1)
        strength = np.where(inside, mean * (1 - mean) / np.where(inside, variance, 1.0) - 1, np.nan)
        table.loc[rows, "p"] = stats.beta.sf(chosen["value"], mean * strength, (1 - mean) * strength)
    table["p_holm"] = table["p"]
    layers = table[table["layer"] != "total"]
    for rows in layers.groupby(["metric", "task_a", "task_b"], sort=False).groups.values():
        table.loc[rows, "p_holm"] = holm(table.loc[rows, "p"])
    return table


def bootstrap_interval(
    values: ArrayLike,
    *,
    statistic: Callable[..., ArrayLike] = np.mean,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (efron1987better) of a statistic of independent values.

    With fewer than three values there is no interval, NaN; with equal values it has no width. `statistic`
    takes ``axis``. With few seeds it is too short: five seeds give about 0.85 for a level of 0.95.

    Raises:
        ValueError: level is not between 0 and 1, or a value is NaN.

    >>> bootstrap_interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    given = np.asarray(values, dtype=np.float64).ravel()
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, a number between 0 and 1 was expected")
    if np.isnan(given).any():
        raise ValueError("values contain NaN: leave those seeds out, and say so")
    if len(given) < 3:
        return float("nan"), float("nan")
    # values that differ by their rounding only: the acceleration would be 0 / 0
    if np.ptp(given) <= 64 * np.finfo(np.float64).eps * np.abs(given).max():
        both = float(np.asarray(statistic(given, axis=-1)))
        return both, both
    bootstrap: Any = stats.bootstrap
    found = bootstrap(
        (given,),
        statistic,
        confidence_level=level,
        n_resamples=samples,
        rng=np.random.default_rng(seed),
        method="BCa",
        axis=-1,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def over_seeds(
    tables: Sequence[pd.DataFrame], *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """One tidy table from those of several seeds: the mean value, with ci_low, ci_high and the number of seeds.

    Rows are matched by every column that is not a number computed from the run.

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
        low, high = bootstrap_interval(values.dropna(), level=level, samples=samples, seed=seed)
        rows.append((*(key if isinstance(key, tuple) else (key,)), values.mean(), low, high, int(values.count())))
    return pd.DataFrame(rows, columns=[*keys, "value", "ci_low", "ci_high", "seeds"])


@dataclass(frozen=True)
class PermutationTest:
    """How strongly two quantities go together, and how often shuffling one of them does as well."""

    statistic: float
    p_value: float
    low: float
    """2.5 % quantile of the statistic when the pairing is shuffled."""
    high: float
    """97.5 % quantile."""
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

    The pairing is shuffled within each of `groups` (a seed, a run, a method), so differences between groups
    cannot pass for an effect; the statistic is the correlation of what is left after each group's mean (of
    ranks, for ``"spearman"``) is taken off. ``p = (1 + as extreme) / (1 + samples)``, never zero.

    Raises:
        ValueError: lengths differ, fewer than four pairs, NaN, or a quantity without variation.

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
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    x, y = (_centred(values, members, ranks=method == "spearman") for values in (x, y))
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    if scale == 0:
        raise ValueError("imbalance or forgetting does not vary within any group: nothing to test")
    draw = np.random.default_rng(seed)
    shuffled = np.empty(samples)
    for place in range(samples):
        mixed = y.copy()
        for group in members:
            mixed[group] = y[draw.permutation(group)]
        shuffled[place] = x @ mixed / scale
    statistic = float(np.clip(x @ y / scale, -1.0, 1.0))
    extreme = int((np.abs(shuffled) >= abs(statistic) - 1e-12).sum())  # ties count, whatever their rounding
    low, high = np.quantile(shuffled, [0.025, 0.975])
    return PermutationTest(statistic, (1 + extreme) / (1 + samples), float(low), float(high), len(x), samples)


def _centred(values: Array, members: Sequence[NDArray[np.int64]], *, ranks: bool) -> Array:
    """Values, or their ranks, within each group and less its mean."""
    left = np.empty_like(values)
    for group in members:
        part = stats.rankdata(values[group]) if ranks else values[group]
        left[group] = part - part.mean()
    return left
