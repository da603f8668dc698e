"""Null laws of overlaps and cosines for random subspaces, and Holm's correction for many layers."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]
TWO_SIDED = ("alignment", "sign_conflict")


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
        return 2 * a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1) * (n + 2)) / min(a, b) ** 2

    @property
    def std(self) -> float:
        """Root of the variance."""
        return float(np.sqrt(self.variance))

    @property
    def exact(self) -> bool:
        """Whether `quantile` and `p_value` are exact: one of the subspaces, or a complement, is a line."""
        return min(self.a, self.b, self.n - self.a, self.n - self.b) <= 1

    def quantile(self, q: ArrayLike) -> Array:
        """Quantiles from the beta law of this mean and variance, above the least possible overlap; see `exact`."""
        low, law = self._law()
        return np.full(np.shape(q), low) if law is None else np.asarray(low + (1 - low) * special.betaincinv(*law, q))

    def p_value(self, overlap: ArrayLike) -> Array:
        """Probability of at least this overlap."""
        low, law = self._law()
        values = np.asarray(overlap, dtype=np.float64)
        if law is None:
            return np.where(values <= low, 1.0, 0.0)
        return beta_tail(*law, (values - low) / (1 - low))

    def sample(self, count: int, *, seed: int = 0) -> Array:
        """Independent draws; O(min(a, b)³) each, whatever n is."""
        cosines = random_cosines(self.n, self.a, self.b, count, draw=np.random.default_rng(seed))
        return np.asarray((cosines**2).sum(-1) / min(self.a, self.b))

    def _law(self) -> tuple[float, tuple[float, float] | None]:
        """The least possible overlap, and the shapes of the beta law above it, None where there is no spread."""
        low = max(0, self.a + self.b - self.n) / min(self.a, self.b)  # subspaces have a + b − n directions in common
        mean, variance = (self.mean - low) / (1 - low or 1), self.variance / (1 - low or 1) ** 2
        if not (0 < mean < 1 and variance > 0):
            return low, None
        strength = mean * (1 - mean) / variance - 1
        return low, (mean * strength, (1 - mean) * strength)


def beta_tail(a: ArrayLike, b: ArrayLike, values: ArrayLike) -> Array:
    """Probability that a beta variable of shapes a and b is at least `values`; 1 below 0, and 0 above 1."""
    # scipy.special: importing scipy.stats takes a second
    return np.asarray(special.betaincc(a, b, np.clip(np.asarray(values, dtype=np.float64), 0.0, 1.0)))


def random_block(n: int, a: int, b: int, count: int, *, draw: np.random.Generator) -> Array:
    """Draws (count, a, b) of ``V_aᵀ V_b`` for a fixed a-frame and a random b-frame in R^n, a + b ≤ n.

    The first a rows of a random b-frame are ``G R⁻¹`` with G Gaussian (a, b) and ``RᵀR = GᵀG + S``; S, the Gram
    matrix of the other n − a rows, is drawn as a Wishart matrix by Bartlett's triangle. O(b³) per draw for any n.
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

    `shape` is that of the variance's gamma law (docs/analysis.md, "How exact p is"), exact for rank one. A cosine
    ``Σ_ij s_i t_j X_ij Y_ij`` of random blocks X and Y is normal given X, with variance ``Σ s_i² t_j² X_ij²``.

    >>> round(float(alignment_p_value(1.959964, 1e9)), 4)  # a normal number
    0.05
    """
    distance = np.abs(np.asarray(z, dtype=np.float64))[..., None]
    k = np.asarray(shape, dtype=np.float64)[..., None]  # not broadcast: one law for many z costs one density
    # The trapezoidal rule over the logarithm of the variance, up to where the gamma density is below e^-30.
    grid = np.linspace(-1.0, 1.0, 2001)
    reach = np.where(grid < 0, np.maximum(12 / np.sqrt(k), 30 / k), np.minimum(12 / np.sqrt(k), 6.0))
    logs = np.broadcast_to(grid, reach.shape) * reach
    density = np.exp(k * (logs - np.expm1(logs)))
    tail = 2 * special.ndtr(-distance * np.exp(-logs / 2))
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

    ``z`` = (value − chance) / chance_std. ``p`` is the probability of at least this value for frames drawn uniformly at
    random with the same spectra; how exact it is: docs/analysis.md, "How exact p is". It is two-sided for alignment.
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
        table.loc[rows, "p"] = beta_tail(mean * strength, (1 - mean) * strength, chosen["value"])
    table["p_holm"] = table["p"]
    layers = table[table["layer"] != "total"]
    for rows in layers.groupby(["metric", "task_a", "task_b"], sort=False).groups.values():
        table.loc[rows, "p_holm"] = holm(table.loc[rows, "p"])
    return table
