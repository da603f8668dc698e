"""Singular values of updates, and the numbers that describe how they are spread.

Every function of a spectrum takes singular values in its last dimension, in any order and on any scale, and
returns one number per leading index. An update that is zero has no spread: that is an error, never a NaN.
`weights` says what is spread: ``"energy"``, shares p ∝ σ², or ``"singular"``, shares p ∝ σ.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Weights = Literal["energy", "singular"]
Array = NDArray[np.float64]


def _spectrum(sigma: ArrayLike) -> Array:
    values = np.asarray(sigma, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"a spectrum needs at least one singular value, got shape {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values are finite and not negative")
    return values


def _shares(sigma: ArrayLike, weights: Weights) -> Array:
    if weights not in ("energy", "singular"):
        raise ValueError(f"weights is {weights!r}, choose 'energy' (σ²) or 'singular' (σ)")
    values = _spectrum(sigma)
    top = values.max(-1, keepdims=True)
    if (top == 0).any():
        raise ValueError(f"{int((top == 0).sum())} of {top.size} spectra are zero: a zero update has no spread")
    values = values / top  # before squaring: σ² of a tiny update would underflow
    mass = values**2 if weights == "energy" else values
    return np.asarray(mass / mass.sum(-1, keepdims=True))


def spectral_entropy(sigma: ArrayLike, *, weights: Weights = "energy", normalized: bool = False) -> Array:
    """``−Σ p ln p`` in nats; `normalized` divides by ln r and gives a number in [0, 1].

    r is the number of singular values given, zeros included. For r = 1 the normalised entropy is NaN.

    Raises:
        ValueError: a spectrum is zero, or no spectrum at all.

    >>> float(spectral_entropy([2.0, 2.0], normalized=True))
    1.0
    >>> round(float(spectral_entropy([3.0, 1.0])), 6)  # −0.9 ln 0.9 − 0.1 ln 0.1
    0.325083
    """
    shares = _shares(sigma, weights)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    entropy = np.asarray((-shares * logs).sum(-1) + 0.0)
    if not normalized:
        return entropy
    count = shares.shape[-1]
    return entropy / np.log(count) if count > 1 else entropy * np.nan


def renyi_entropy(sigma: ArrayLike, order: float, *, weights: Weights = "energy") -> Array:
    """``ln(Σ p^q) / (1 − q)`` in nats for order q; the Shannon entropy at 1, ``−ln max p`` at infinity.

    Raises:
        ValueError: the order is negative, or a spectrum is zero.

    >>> round(float(np.exp(renyi_entropy([3.0, 1.0], 2))), 6)  # 1 / (0.9² + 0.1²)
    1.219512
    """
    if order < 0 or np.isnan(order):
        raise ValueError(f"order is {order}, a number from 0 to infinity was expected")
    if order == 1:
        return spectral_entropy(sigma, weights=weights)
    shares = _shares(sigma, weights)
    if np.isinf(order):
        return np.asarray(-np.log(shares.max(-1)) + 0.0)
    powers = np.where(shares > 0, shares**order, 0.0)  # a vanishing share counts for nothing, at order 0 as well
    return np.asarray(np.log(powers.sum(-1)) / (1.0 - order) + 0.0)


def effective_rank(sigma: ArrayLike, *, weights: Weights = "energy") -> Array:
    """``exp(entropy)``, in [1, r]; ``weights="singular"`` is the effective rank of Roy and Vetterli (2007).

    >>> round(float(effective_rank([1.0, 1.0, 0.0])), 6)
    2.0
    """
    return np.exp(spectral_entropy(sigma, weights=weights))


def participation_ratio(sigma: ArrayLike) -> Array:
    """``1 / Σ p²`` of the energy shares, the exponential of the Rényi-2 entropy, in [1, r].

    >>> round(float(participation_ratio([3.0, 1.0])), 6)
    1.219512
    """
    return np.asarray(1.0 / (_shares(sigma, "energy") ** 2).sum(-1))


def stable_rank(sigma: ArrayLike) -> Array:
    """``‖ΔW‖_F² / ‖ΔW‖₂²``, in [1, r].

    >>> round(float(stable_rank([3.0, 1.0])), 6)  # 10 / 9
    1.111111
    """
    return np.asarray(1.0 / _shares(sigma, "energy").max(-1))


def top_energy(sigma: ArrayLike, k: int) -> Array:
    """Share of the energy in the `k` largest singular values, in [k/r, 1]; 1 when there are at most k.

    >>> round(float(top_energy([3.0, 1.0], 1)), 6)
    0.9
    """
    if k < 1:
        raise ValueError(f"k is {k}, at least 1 was expected")
    return np.asarray(np.sort(_shares(sigma, "energy"), -1)[..., -k:].sum(-1))


def spectral_flatness(sigma: ArrayLike) -> Array:
    """Geometric over arithmetic mean of σ², in [0, 1]; 1 for a flat spectrum.

    >>> round(float(spectral_flatness([3.0, 1.0])), 6)  # 3 / 5
    0.6
    """
    shares = _shares(sigma, "energy")
    with np.errstate(divide="ignore"):  # ln 0 = −inf is right: one vanishing value makes the mean vanish
        logs = np.log(shares).mean(-1)
    return np.asarray(np.exp(logs) * shares.shape[-1])


def gini(sigma: ArrayLike) -> Array:
    """Gini coefficient of σ², in [0, 1 − 1/r]; 0 for a flat spectrum.

    >>> round(float(gini([3.0, 1.0])), 6)  # (0.9 − 0.1) / 2
    0.4
    """
    shares = np.sort(_shares(sigma, "energy"), -1)
    count = shares.shape[-1]
    return np.asarray((shares * (2 * np.arange(1, count + 1) - count - 1)).sum(-1) / count)


def frobenius_norm(sigma: ArrayLike) -> Array:
    """``‖ΔW‖_F = (Σ σ²)^½``.

    >>> float(frobenius_norm([3.0, 4.0]))
    5.0
    """
    return np.asarray(np.linalg.norm(_spectrum(sigma), axis=-1))


def spectral_norm(sigma: ArrayLike) -> Array:
    """``‖ΔW‖₂``, the largest singular value.

    >>> float(spectral_norm([3.0, 4.0]))
    4.0
    """
    return np.asarray(_spectrum(sigma).max(-1))


def condition_number(sigma: ArrayLike) -> Array:
    """Largest over smallest singular value; infinite when one vanishes, an error when all do.

    >>> float(condition_number([3.0, 1.5]))
    2.0
    """
    values = _spectrum(sigma)
    _shares(values, "singular")
    with np.errstate(divide="ignore"):  # one value that vanishes
        return np.asarray(values.max(-1) / values.min(-1))
