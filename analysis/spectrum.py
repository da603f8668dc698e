"""Singular values of updates, and the numbers that describe how they are spread.

Every function of a spectrum takes singular values in its last dimension, in any order and on any scale, and
returns one number per leading index. An update that is zero has no spread: NaN. `weights` says what is spread:
``"energy"``, shares p ∝ σ², or ``"singular"``, shares p ∝ σ.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from analysis.adapters import AdapterSet
from analysis.buckets import layer_batches, stacked_factors
from analysis.names import block_of, module_of

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
    with np.errstate(invalid="ignore"):  # 0/0 of a zero update is the NaN that we promise
        values = values / top  # before squaring: σ² of a tiny update would underflow
        mass = values**2 if weights == "energy" else values
        shares: Array = mass / mass.sum(-1, keepdims=True)
    return shares


def spectral_entropy(sigma: ArrayLike, *, weights: Weights = "energy", normalized: bool = False) -> Array:
    """``−Σ p ln p`` in nats; `normalized` divides by ln r and gives a number in [0, 1].

    r is the number of singular values given, zeros included. For r = 1 the normalised entropy is NaN.

    >>> float(spectral_entropy([2.0, 2.0], normalized=True))
    1.0
    """
    shares = _shares(sigma, weights)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    entropy: Array = np.where(np.isnan(shares), np.nan, -shares * logs).sum(-1) + 0.0
    if not normalized:
        return entropy
    count = shares.shape[-1]
    return entropy / np.log(count) if count > 1 else entropy * np.nan


def effective_rank(sigma: ArrayLike, *, weights: Weights = "energy") -> Array:
    """``exp(entropy)``, in [1, r]; ``weights="singular"`` is the effective rank of Roy and Vetterli (2007).

    >>> round(float(effective_rank([1.0, 1.0, 0.0])), 6)
    2.0
    """
    return np.exp(spectral_entropy(sigma, weights=weights))


def participation_ratio(sigma: ArrayLike) -> Array:
    """``1 / Σ p²`` of the energy shares, the exponential of the Rényi-2 entropy, in [1, r]."""
    ratio: Array = 1.0 / (_shares(sigma, "energy") ** 2).sum(-1)
    return ratio


def stable_rank(sigma: ArrayLike) -> Array:
    """``‖ΔW‖_F² / ‖ΔW‖₂²``, in [1, r]."""
    rank: Array = 1.0 / _shares(sigma, "energy").max(-1)
    return rank


def top_energy(sigma: ArrayLike, k: int) -> Array:
    """Share of the energy in the `k` largest singular values, in [k/r, 1]; 1 when there are at most k.

    >>> round(float(top_energy([3.0, 1.0], 1)), 6)
    0.9
    """
    if k < 1:
        raise ValueError(f"k is {k}, at least 1 was expected")
    shares = np.sort(_shares(sigma, "energy"), -1)
    energy: Array = shares[..., -k:].sum(-1)
    return energy


def spectral_flatness(sigma: ArrayLike) -> Array:
    """Geometric over arithmetic mean of σ², in [0, 1]; 1 for a flat spectrum."""
    shares = _shares(sigma, "energy")
    with np.errstate(divide="ignore"):  # ln 0 = −inf is right: one vanishing value makes the mean vanish
        logs = np.log(shares).mean(-1)
    flatness: Array = np.exp(logs) * shares.shape[-1]
    return flatness


def gini(sigma: ArrayLike) -> Array:
    """Gini coefficient of σ², in [0, 1 − 1/r]; 0 for a flat spectrum."""
    shares = np.sort(_shares(sigma, "energy"), -1)
    count = shares.shape[-1]
    coefficient: Array = (shares * (2 * np.arange(1, count + 1) - count - 1)).sum(-1) / count
    return coefficient


def frobenius_norm(sigma: ArrayLike) -> Array:
    """``‖ΔW‖_F = (Σ σ²)^½``."""
    norm: Array = np.linalg.norm(_spectrum(sigma), axis=-1)
    return norm


def spectral_norm(sigma: ArrayLike) -> Array:
    """``‖ΔW‖₂``, the largest singular value."""
    norm: Array = _spectrum(sigma).max(-1)
    return norm


def condition_number(sigma: ArrayLike) -> Array:
    """Largest over smallest singular value; infinite when one vanishes, NaN when all do."""
    values = _spectrum(sigma)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = values.max(-1) / values.min(-1)
    return ratio


def _metrics(top: tuple[int, ...]) -> Mapping[str, Callable[[Array], Array]]:
    """Name in the table to function; a name says which of several conventions it follows."""
    return {
        "entropy_energy": spectral_entropy,
        "entropy_energy_normalized": partial(spectral_entropy, normalized=True),
        "effective_rank_energy": effective_rank,
        "effective_rank_roy_vetterli": partial(effective_rank, weights="singular"),
        "participation_ratio": participation_ratio,
        "stable_rank": stable_rank,
        **{f"top{k}_energy": partial(top_energy, k=k) for k in top},
        "spectral_flatness_energy": spectral_flatness,
        "gini_energy": gini,
        "frobenius": frobenius_norm,
        "spectral_norm": spectral_norm,
        "condition": condition_number,
    }


def _core_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of ``left rightᵀ`` from the triangular factors of thin QR, descending.

    The Gram matrices would square the condition number; Householder QR keeps every column to rounding.
    """
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def _spectra(
    adapters: AdapterSet, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[tuple[str, ...], Mapping[str, list[Array]]]]:
    """Layers of equal shape, with (L, k) singular values of every task's own and accumulated update.

    A sum of updates is the product of the stacked factors. One QR serves all sums: the leading columns of R
    belong to the leading columns of the stack. O((m + n) R² + R³) a layer for R the sum of all ranks.
    """
    for layers in layer_batches(adapters):
        lefts, rights = stacked_factors(adapters, layers, device=device, dtype=dtype)
        alone = [
            _core_values(torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right, mode="r").R)
            for left, right in zip(lefts, rights, strict=True)
        ]
        left = torch.linalg.qr(torch.cat(lefts, -1), mode="r").R
        right = torch.linalg.qr(torch.cat(rights, -1), mode="r").R
        ends = np.cumsum([part.shape[-1] for part in lefts]).tolist()
        sums = [_core_values(left[:, :end, :end], right[:, :end, :end]) for end in ends]
        yield (
            layers,
            {
                "task": [values.cpu().double().numpy() for values in alone],
                "accumulated": [values.cpu().double().numpy() for values in sums],
            },
        )


def singular_values(
    adapters: AdapterSet, device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float64
) -> pd.DataFrame:
    """Tidy singular values: task, update, layer, index, value.

    `update` is ``"task"`` for what the task added and ``"accumulated"`` for the sum of all updates up to it.
    `index` counts from 1, values descend. Factors are float32; the default double precision keeps singular
    values that are 1e-6 of the largest to full accuracy (use float32 on devices without it).
    """
    rows: list[tuple[str, str, str, int, float]] = []
    for layers, spectra in _spectra(adapters, device, dtype):
        for update, by_task in spectra.items():
            for task, values in zip(adapters.tasks, by_task, strict=True):
                for layer, sigma in zip(layers, values.tolist(), strict=True):
                    rows += [(task, update, layer, index, value) for index, value in enumerate(sigma, start=1)]
    return _in_order(pd.DataFrame(rows, columns=["task", "update", "layer", "index", "value"]), adapters)


def spectrum_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    top: tuple[int, ...] = (1, 4),
    dtype: torch.dtype = torch.float64,
) -> pd.DataFrame:
    """Tidy metrics of every spectrum: task, update, layer, module, block, metric, value, ci_low, ci_high.

    `update` as in `singular_values`; `module` is the last part of the layer's name, `block` its first number
    or NA. Metric names carry their convention: ``_energy`` shares are σ², ``_roy_vetterli`` shares are σ,
    ``_normalized`` entropies are divided by the logarithm of the number of singular values. Entropies in nats.
    The interval is NaN for metrics that are computed exactly, at present all of them.
    """
    metrics = _metrics(top)
    rows: list[tuple[Any, ...]] = []
    for layers, spectra in _spectra(adapters, device, dtype):
        for update, by_task in spectra.items():
            for task, values in zip(adapters.tasks, by_task, strict=True):
                for metric, function in metrics.items():
                    rows += [(task, update, *row, metric) for row in zip(layers, function(values), strict=True)]
    frame = pd.DataFrame(rows, columns=["task", "update", "layer", "value", "metric"])
    frame["module"] = frame["layer"].map(module_of)
    frame["block"] = pd.array([block_of(layer) for layer in frame["layer"]], dtype="Int64")
    frame["ci_low"] = frame["ci_high"] = np.nan
    columns = ["task", "update", "layer", "module", "block", "metric", "value", "ci_low", "ci_high"]
    return _in_order(frame, adapters)[columns]


def _in_order(frame: pd.DataFrame, adapters: AdapterSet) -> pd.DataFrame:
    """Rows by task, update, layer in the order of the adapters, whatever the batches were."""
    tasks = {task: place for place, task in enumerate(adapters.tasks)}
    layers = {layer: place for place, layer in enumerate(adapters.layers)}
    order = np.lexsort((frame["layer"].map(layers), frame["update"] != "task", frame["task"].map(tasks)))
    return frame.iloc[order].reset_index(drop=True)
