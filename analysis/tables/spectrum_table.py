"""Tidy tables of the spectra of a set of adapters, computed from factors batch by batch."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY, Progress, layer_batches, stacked_factors
from analysis.formats import Checkpoint
from analysis.names import block_of, module_of
from analysis.numerics import spectral_measures as of
from analysis.numerics.decomposition import thin_qr
from analysis.numerics.spectral_measures import Array
from analysis.tables.base_relation import relation_to_base

Zeros = Literal["raise", "omit"]
ROUNDING = float(np.finfo(np.float32).eps)
"""An accumulated update below this share of what was added has cancelled: what is left is rounding."""


def spectral_metrics(top: tuple[int, ...] = (1, 4)) -> Mapping[str, Callable[[Array], Array]]:
    """Name in the table to function of a spectrum; a name says which of several conventions it follows."""
    return {
        "entropy_energy": of.spectral_entropy,
        "entropy_energy_normalized": partial(of.spectral_entropy, normalized=True),
        "entropy_singular": partial(of.spectral_entropy, weights="singular"),
        "entropy_singular_normalized": partial(of.spectral_entropy, weights="singular", normalized=True),
        "renyi2_entropy_energy": partial(of.renyi_entropy, order=2),
        "effective_rank_energy": of.effective_rank,
        "effective_rank_roy_vetterli": partial(of.effective_rank, weights="singular"),
        "participation_ratio": of.participation_ratio,
        "stable_rank": of.stable_rank,
        **{f"top{k}_energy": partial(of.top_energy, k=k) for k in top},
        "spectral_flatness_energy": of.spectral_flatness,
        "gini_energy": of.gini,
        "frobenius": of.frobenius_norm,
        "spectral_norm": of.spectral_norm,
        "condition": of.condition_number,
    }


def _core_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of ``left rightᵀ`` from the triangular factors of thin QR, descending."""
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def _triangle(x: Tensor) -> Tensor:
    """R of the thin QR; Householder QR keeps every column to rounding, where a Gram matrix would square."""
    if x.device.type == "cpu":
        r: Tensor = torch.linalg.qr(x, mode="r").R
        return r
    return thin_qr(x)[1]


def _spectra(
    adapters: AdapterSet, device: torch.device | str, dtype: torch.dtype, memory: int, progress: Progress | None
) -> Iterator[tuple[tuple[str, ...], Mapping[str, list[Array]]]]:
    """Layers of equal shape, with (L, k) singular values of every task's own and accumulated update.

    A sum of updates is the product of the stacked factors. One QR serves all sums: the leading columns of R
    belong to the leading columns of the stack. O((m + n) R² + R³) a layer for R the sum of all ranks.
    """
    for layers in layer_batches(adapters, memory=memory, progress=progress):
        lefts, rights = stacked_factors(adapters, layers, device=device, dtype=dtype)
        alone = [
            _core_values(_triangle(left), _triangle(right)).cpu().double().numpy()
            for left, right in zip(lefts, rights, strict=True)
        ]
        sums = alone[:1]
        if len(lefts) > 1:
            ends = np.cumsum([part.shape[-1] for part in lefts]).tolist()
            left, right = _triangle(torch.cat(lefts, -1)), _triangle(torch.cat(rights, -1))
            sums = sums + [_core_values(left[:, :e, :e], right[:, :e, :e]).cpu().double().numpy() for e in ends[1:]]
        yield layers, {"task": alone, "accumulated": sums}


def singular_values(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float64,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy singular values: task, update, layer, index, value.

    `update` is ``"task"`` for what the task added and ``"accumulated"`` for the sum of all updates up to it.
    `index` counts from 1, values descend. Factors are float32; the default double precision keeps singular
    values that are 1e-6 of the largest to full accuracy (use float32 on devices without it). `memory` is the
    budget in bytes, `progress` is told the layers done and all of them.
    """
    parts: list[pd.DataFrame] = []
    for layers, spectra in _spectra(adapters, device, dtype, memory, progress):
        for update, by_task in spectra.items():
            for task, values in zip(adapters.tasks, by_task, strict=True):
                count, width = values.shape
                parts.append(
                    pd.DataFrame(
                        {
                            "task": task,
                            "update": update,
                            "layer": np.repeat(np.array(layers, dtype=object), width),
                            "index": np.tile(np.arange(1, width + 1), count),
                            "value": values.ravel(),
                        }
                    )
                )
    return _in_order(pd.concat(parts, ignore_index=True), adapters)


def spectrum_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    top: tuple[int, ...] = (1, 4),
    dtype: torch.dtype = torch.float64,
    memory: int = MEMORY,
    zeros: Zeros = "raise",
    base: Checkpoint | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy metrics of every spectrum: task, update, layer, module, block, metric, value, ci_low, ci_high.

    `update` as in `singular_values`; `module` is the last part of the layer's name, `block` its first number
    or NA. Metric names carry their convention: ``_energy`` shares are σ², ``_singular`` and ``_roy_vetterli``
    shares are σ, ``_normalized`` entropies are divided by the logarithm of the number of singular values.
    Entropies in nats. The interval is NaN for metrics that are computed exactly, at present all of them.

    Args:
        adapters: the updates.
        device: where the factors are decomposed.
        top: numbers of leading directions whose share of the energy is given.
        dtype: precision of the decomposition.
        memory: budget in bytes; what is needed does not grow with the number of layers.
        zeros: ``"omit"`` leaves updates out that are zero, or sums that cancel to rounding.
        base: the model that was adapted; adds `relation_to_base`.
        progress: told the layers done and all of them.

    Raises:
        ValueError: an update is zero and `zeros` is ``"raise"``; the first ones are named.
    """
    if zeros not in ("raise", "omit"):
        raise ValueError(f"zeros is {zeros!r}, choose 'raise' or 'omit'")
    metrics = spectral_metrics(top)
    rows: list[tuple[Any, ...]] = []
    nothing: list[str] = []
    for layers, spectra in _spectra(adapters, device, dtype, memory, progress):
        for update, by_task in spectra.items():
            added = np.zeros(len(layers))
            for place, (task, values) in enumerate(zip(adapters.tasks, by_task, strict=True)):
                added = added + spectra["task"][place].max(-1)
                there = values.max(-1) > (ROUNDING * added if update == "accumulated" and place else 0.0)
                nothing += [f"{task}: {layer} ({update})" for layer in np.array(layers)[~there]]
                known = [layer for layer, kept in zip(layers, there, strict=True) if kept]
                for metric, function in metrics.items() if known else ():
                    found = function(values[there]).tolist()
                    rows += [(task, update, *row, metric) for row in zip(known, found, strict=True)]
    if nothing and zeros == "raise":
        raise ValueError(
            f"{len(nothing)} updates are zero and have no spectrum, the first is {nothing[0]}: train them, or leave "
            "them out with zeros='omit'"
        )
    frame = pd.DataFrame(rows, columns=["task", "update", "layer", "value", "metric"]).astype({"value": "float64"})
    if base is not None:
        frame = pd.concat([frame, relation_to_base(adapters, base)], ignore_index=True)
    names = {layer: (module_of(layer), block_of(layer)) for layer in adapters.layers}
    frame["module"] = frame["layer"].map({layer: module for layer, (module, _) in names.items()})
    frame["block"] = pd.array([names[layer][1] for layer in frame["layer"]], dtype="Int64")
    frame["ci_low"] = frame["ci_high"] = np.nan
    columns = ["task", "update", "layer", "module", "block", "metric", "value", "ci_low", "ci_high"]
    return _in_order(frame, adapters)[columns]


def _in_order(frame: pd.DataFrame, adapters: AdapterSet) -> pd.DataFrame:
    """Rows by task, update, layer in the order of the adapters, whatever the batches were."""
    tasks = {task: place for place, task in enumerate(adapters.tasks)}
    layers = {layer: place for place, layer in enumerate(adapters.layers)}
    order = np.lexsort((frame["layer"].map(layers), frame["update"] != "task", frame["task"].map(tasks)))
    return frame.iloc[order].reset_index(drop=True)


def left_out(adapters: AdapterSet, table: pd.DataFrame) -> list[str]:
    """Which updates a `spectrum_table` with ``zeros="omit"`` lacks, by name: zero ones, and sums that cancel."""
    there = set(zip(table["task"], table["update"], table["layer"], strict=True))
    return [
        f"{task}, {layer}{' (sum of all updates so far)' if update == 'accumulated' else ''}"
        for task in adapters.tasks
        for update in ("task", "accumulated")
        for layer in adapters.layers
        if (task, update, layer) not in there
    ]
