"""Tidy tables of singular values, and of measures of spectra."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY_BUDGET, LayerBatch, Progress, layer_batches
from analysis.formats import Checkpoint
from analysis.names import block_of, module_of
from analysis.numerics import spectral_measures as measures
from analysis.numerics.spectral_measures import Array
from analysis.tables.base_relation import relation_to_base
from analysis.tables.frames import in_order

Zeros = Literal["raise", "omit"]
NORMS = ("frobenius", "spectral_norm")
"""Metrics that a zero update has too: they are 0."""
ROUNDING = float(np.finfo(np.float32).eps)
"""An accumulated update below this share of what was added has cancelled: what is left is rounding."""


def spectral_metrics(top: tuple[int, ...] = (1, 4)) -> Mapping[str, Callable[[Array], Array]]:
    """Name in the table to function of a spectrum; a name says which of several conventions it follows."""
    return {
        "entropy_energy": measures.spectral_entropy,
        "entropy_energy_normalized": partial(measures.spectral_entropy, normalized=True),
        "entropy_singular": partial(measures.spectral_entropy, weights="singular"),
        "entropy_singular_normalized": partial(measures.spectral_entropy, weights="singular", normalized=True),
        "renyi2_entropy_energy": partial(measures.renyi_entropy, order=2),
        "effective_rank_energy": measures.effective_rank,
        "effective_rank_roy_vetterli": partial(measures.effective_rank, weights="singular"),
        "participation_ratio": measures.participation_ratio,
        "stable_rank": measures.stable_rank,
        **{f"top{k}_energy": partial(measures.top_energy, k=k) for k in top},
        "spectral_flatness_energy": measures.spectral_flatness,
        "gini_energy": measures.gini,
        "frobenius": measures.frobenius_norm,
        "spectral_norm": measures.spectral_norm,
        "condition": measures.condition_number,
    }


Spectra = list[tuple[tuple[str, ...], Mapping[str, list[Array]]]]
"""Per batch: its layers, and singular values (L, k) per task of ``"task"`` and ``"accumulated"`` updates."""


def batch_spectra(batch: LayerBatch) -> tuple[tuple[str, ...], Mapping[str, list[Array]]]:
    """The spectra of one batch."""
    own = [update.values for update in batch.updates]
    values = {"task": own, "accumulated": batch.decomposition.accumulated_values()}
    return batch.layers, {key: [sigma.cpu().double().numpy() for sigma in sigmas] for key, sigmas in values.items()}


def singular_values(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float64,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy singular values: task, update, layer, index, value.

    `update` is ``"task"`` for what the task added and ``"accumulated"`` for the sum of all updates up to it.
    `index` counts from 1, values descend. Double precision keeps singular values that are 1e-6 of the largest to full
    accuracy. `memory_budget` is in bytes, `progress` is called with the number of finished layers and of all layers.
    """
    batches = layer_batches(adapters, device=device, dtype=dtype, memory_budget=memory_budget, progress=progress)
    return singular_value_frame(adapters, [batch_spectra(batch) for batch in batches])


def singular_value_frame(adapters: AdapterSet, spectra: Spectra) -> pd.DataFrame:
    """The table of `singular_values`."""
    parts = [
        pd.DataFrame(
            {
                "task": task,
                "update": update,
                "layer": np.repeat(np.array(layers, dtype=object), values.shape[1]),
                "index": np.tile(np.arange(1, values.shape[1] + 1), len(layers)),
                "value": values.ravel(),
            }
        )
        for layers, by_update in spectra
        for update, by_task in by_update.items()
        for task, values in zip(adapters.tasks, by_task, strict=True)
    ]
    return _in_order(pd.concat(parts, ignore_index=True), adapters)


def spectrum_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    top: tuple[int, ...] = (1, 4),
    dtype: torch.dtype = torch.float64,
    memory_budget: int = MEMORY_BUDGET,
    zeros: Zeros = "raise",
    base: Checkpoint | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy metrics of every spectrum: task, update, layer, module, block, metric, value.

    `update` as in `singular_values`; `module` is the last part of the layer's name, `block` its first number
    or NA. Metrics, their formulas and units: docs/analysis.md, "Spectra".

    Args:
        adapters: the updates.
        device: where the factors are decomposed.
        top: numbers of leading directions whose share of the energy is a metric.
        dtype: precision of the decomposition.
        memory_budget: bytes; the memory needed does not grow with the number of layers.
        zeros: ``"omit"`` leaves out updates that are zero, and sums that cancel to rounding.
        base: the model that was adapted; adds `relation_to_base`.
        progress: called with the number of finished layers and of all layers.

    Raises:
        ValueError: an update is zero and `zeros` is ``"raise"``; the first ones are named.
    """
    if zeros not in ("raise", "omit"):
        raise ValueError(f"zeros is {zeros!r}, choose 'raise' or 'omit'")
    batches = layer_batches(adapters, device=device, dtype=dtype, memory_budget=memory_budget, progress=progress)
    return spectrum_frame(adapters, [batch_spectra(batch) for batch in batches], top=top, zeros=zeros, base=base)


def spectrum_frame(
    adapters: AdapterSet,
    spectra: Spectra,
    *,
    top: tuple[int, ...] = (1, 4),
    zeros: Zeros = "raise",
    base: Checkpoint | None = None,
) -> pd.DataFrame:
    """The table of `spectrum_table`."""
    metrics = spectral_metrics(top)
    rows: list[tuple[Any, ...]] = []
    zero: list[str] = []
    for layers, by_update in spectra:
        for update, by_task in by_update.items():
            added = np.zeros(len(layers))
            for position, (task, values) in enumerate(zip(adapters.tasks, by_task, strict=True)):
                added = added + by_update["task"][position].max(-1, initial=0.0)  # rank 0 is a zero update
                kept = values.max(-1, initial=0.0) > (ROUNDING * added if update == "accumulated" and position else 0.0)
                zero += [f"{task}: {layer} ({update})" for layer in np.array(layers)[~kept]]
                names = list(np.array(layers, dtype=object)[kept])
                for metric, measure in metrics.items() if names else ():
                    numbers = measure(values[kept]).tolist()
                    rows += [(task, update, layer, value, metric) for layer, value in zip(names, numbers, strict=True)]
    if zero and zeros == "raise":
        raise ValueError(
            f"{len(zero)} updates are zero and have no spectrum, the first is {zero[0]}: train them, or leave "
            "them out with zeros='omit'"
        )
    frame = pd.DataFrame(rows, columns=["task", "update", "layer", "value", "metric"]).astype({"value": "float64"})
    if base is not None:
        frame = pd.concat([frame, relation_to_base(adapters, base)], ignore_index=True)
    frame["module"] = frame["layer"].map(module_of)
    frame["block"] = pd.array([block_of(layer) for layer in frame["layer"]], dtype="Int64")
    return _in_order(frame, adapters)[["task", "update", "layer", "module", "block", "metric", "value"]]


def _in_order(frame: pd.DataFrame, adapters: AdapterSet) -> pd.DataFrame:
    return in_order(frame, {"task": adapters.tasks, "update": ("task", "accumulated"), "layer": adapters.layers})


def zero_updates(adapters: AdapterSet, table: pd.DataFrame) -> list[str]:
    """The updates that a `spectrum_table` with ``zeros="omit"`` lacks, by name: zero ones, and sums that cancel."""
    return [
        f"{task}, {layer}{' (sum of all updates so far)' if update == 'accumulated' else ''}"
        for task, update, layer in _without_spectrum(adapters, table)
    ]


def zero_rows(adapters: AdapterSet, table: pd.DataFrame) -> pd.DataFrame:
    """The rows that a `spectrum_table` with ``zeros="omit"`` lacks: norms are 0, other metrics NaN, thus unknown."""
    rows = [
        (task, update, layer, metric, 0.0 if metric in NORMS else np.nan)
        for task, update, layer in _without_spectrum(adapters, table)
        for metric in spectral_metrics()
    ]
    return pd.DataFrame(rows, columns=["task", "update", "layer", "metric", "value"])


def _without_spectrum(adapters: AdapterSet, table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Task, kind of update and layer of the updates without a spectrum in a table."""
    rows = table[table["metric"].isin(NORMS)]  # a zero update has the other rows too, those relative to the base
    there = set(zip(rows["task"], rows["update"], rows["layer"], strict=True))
    every = product(adapters.tasks, ("task", "accumulated"), adapters.layers)
    return [each for each in every if each not in there]
