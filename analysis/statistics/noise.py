"""The null law of an adapter's spectrum: singular values of a product of two random factors."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]
LEAST_DRAWS, MOST_DRAWS = 500, 2000
"""Draws that a law is fitted to; fewer for large ranks, whose laws are narrow and cost r³ per draw."""


@dataclass(frozen=True)
class ProductNull:
    """The law of ``λ_k = σ_k² / mean(σ²)``, σ the singular values of ``B A`` with random B (m, r) and A (r, n).

    The entries of each factor are independent, with mean 0 and one variance. No scale is needed: the mean of σ² of the
    same update is the unit. Derivation: docs/analysis-noise.md, "The law".

    >>> null = ProductNull(m=32, n=32, r=32)
    >>> round(null.edge, 6)  # 27 / 4 for square factors
    6.75
    """

    m: int
    n: int
    r: int

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no product of factors has."""
        if not 1 <= self.r <= min(self.m, self.n):
            raise ValueError(f"rank {self.r} must lie between 1 and the smaller side of ({self.m}, {self.n})")

    @property
    def edge(self) -> float:
        """The upper end of the limiting density of λ: the largest λ for large m, n and r of these ratios."""
        a, b = self.r / self.m, self.r / self.n
        # the positive z with λ'(z) = 0, docs/analysis-noise.md: over a common denominator it is a cubic
        roots = np.roots([2 * a * b, a + b + a * b, 0.0, -1.0])
        z = float(roots[(roots.real > 0) & (np.abs(roots.imag) < 1e-9)].real[0])
        return (1 + z) * (1 + a * z) * (1 + b * z) / z

    def density(self, values: ArrayLike) -> Array:
        """The limiting density of λ at these values, from the complex root of its cubic equation."""
        a, b = self.r / self.m, self.r / self.n
        given = np.asarray(values, dtype=np.float64)
        roots = [np.roots([a * b, a + b + a * b, 1 + a + b - value, 1.0]) for value in given.ravel()]
        heights = np.array([np.abs(root.imag).max() for root in roots]).reshape(given.shape)
        return np.asarray(heights / (np.pi * given))

    def sample(self, count: int, *, seed: int = 0) -> Array:
        """Draws (count, r) of λ for Gaussian factors, descending. O(r³) per draw, whatever m and n are."""
        squares = np.linalg.svd(self._cores(count, seed), compute_uv=False) ** 2
        return np.asarray(squares / squares.mean(-1, keepdims=True))

    def _cores(self, count: int, seed: int) -> Array:
        """Matrices (count, r, r) with the singular values of the products."""
        draw = np.random.default_rng(seed)
        left, right = (self._triangles(size, count, draw) for size in (self.m, self.n))
        return np.asarray(left @ np.swapaxes(right, -1, -2))

    def _triangles(self, size: int, count: int, draw: np.random.Generator) -> Array:
        """R of the QR of Gaussian matrices (size, r), by Bartlett: its singular values are all that a product needs."""
        upper = np.triu(draw.standard_normal((count, self.r, self.r)), 1)
        diagonal = np.sqrt(draw.chisquare(size - np.arange(self.r), (count, self.r)))
        return np.asarray(upper + diagonal[..., None] * np.eye(self.r))


def largest_draws(null: ProductNull, count: int, *, seed: int = 0) -> Array:
    """The largest λ (count,) of each draw of `ProductNull.sample`, in half the time.

    Eigenvalues of a Gram matrix err by the rounding of the largest one: that one keeps all its digits.
    """
    cores = null._cores(count, seed)
    grams = np.swapaxes(cores, -1, -2) @ cores
    means = np.trace(grams, axis1=-2, axis2=-1) / null.r
    return np.asarray(np.linalg.eigvalsh(grams)[:, -1] / means)


@dataclass(frozen=True)
class ShiftedGamma:
    """The law of ``start + scale · X``, X of a gamma law."""

    shape: float
    start: float
    scale: float

    def mean(self) -> float:
        """The mean."""
        return self.start + self.shape * self.scale

    def sf(self, values: ArrayLike) -> Array:
        """The probability of larger values, for each of `values`."""
        distance = (np.asarray(values, dtype=np.float64) - self.start) / self.scale
        found: Array = special.gammaincc(self.shape, np.maximum(distance, 0.0))
        return found

    def ppf(self, probability: float) -> float:
        """The quantile."""
        return self.start + self.scale * float(special.gammaincinv(self.shape, probability))


@dataclass(frozen=True)
class NoiseLaws:
    """Laws of the largest λ by shape, each fitted when it is first needed.

    A gamma law with a shift takes mean, variance and skewness of `largest_draws` (chiani2014distribution, for one
    factor). Its accuracy: docs/analysis-noise.md, "How exact p is".
    """

    seed: int = 0

    def largest(self, m: int, n: int, r: int) -> "ShiftedGamma":
        """The law of ``r p₁``, p₁ the energy share of the largest singular value."""
        return _fitted(max(m, n), min(m, n), r, self.seed)  # the law is the same for the transposed matrix

    def p_values(self, sigma: ArrayLike, m: int, n: int, *, level: float) -> Iterator[Array]:
        """One array (L,) per step: the p-value of the next direction, NaN for spectra that stopped before.

        `sigma` (L, r) holds L spectra of one shape. Step k compares ``σ_k²`` with the mean of ``σ_k² ... σ_r²``,
        under the law of a product whose sides and rank are k − 1 smaller (kritchman2009nonparametric, for one factor).
        A spectrum goes on while its p-value is at most `level`. The last direction has no law.
        """
        squares = np.sort(np.asarray(sigma, dtype=np.float64) ** 2, axis=-1)[:, ::-1]
        going = np.arange(len(squares))
        for first in range(squares.shape[1] - 1):
            rest = squares[going, first:]
            found = np.full(len(squares), np.nan)
            found[going] = self.largest(m - first, n - first, rest.shape[1]).sf(rest[:, 0] / rest.mean(1))
            yield found
            going = going[found[going] <= level]
            if not len(going):
                return


@lru_cache(maxsize=1024)
def _fitted(m: int, n: int, r: int, seed: int) -> ShiftedGamma:
    """The law of one shape: a pure function of its arguments, so that all tables of a process share it."""
    count = int(np.clip(MOST_DRAWS * (16 / r) ** 2, LEAST_DRAWS, MOST_DRAWS))
    top = largest_draws(ProductNull(m, n, r), count, seed=seed)
    centred = top - top.mean()
    skewness = float((centred**3).mean() / (centred**2).mean() ** 1.5)
    shape = 4 / max(skewness, 1e-2) ** 2  # 1e-2 is a normal law for all purposes
    scale = top.std(ddof=1) / np.sqrt(shape)
    return ShiftedGamma(shape, float(top.mean() - shape * scale), float(scale))
