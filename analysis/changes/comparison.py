"""Tables of adapters before and after a change."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import (
    MEMORY_BUDGET,
    LayerBatch,
    Progress,
    layer_batches,
    protected_bases,
    protected_energies,
)
from analysis.numerics import spectral_measures as measures
from analysis.tables.frames import in_order

MEASURES: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "frobenius": measures.frobenius_norm,
    "spectral_norm": measures.spectral_norm,
    "entropy_energy_normalized": lambda sigma: measures.spectral_entropy(sigma, normalized=True),
    "effective_rank_energy": measures.effective_rank,
    "stable_rank": measures.stable_rank,
    "top1_energy": lambda sigma: measures.top_energy(sigma, 1),
}
"""Metric to function of singular values; entropies are relative to the number of directions that are used."""
COLUMNS = ["task", "layer", "metric", "before", "after"]
ORDER = ("rank", *MEASURES, "leakage", "relative_change", "cosine")
Row = tuple[str, str, str, float, float]
SUMS = ["a", "b", "inner", "rank_a", "rank_b", "seen_a", "seen_b", "leak_a", "leak_b"]
"""Per update before (a) and after (b): energies, their inner product, ranks, and where directions are protected the
energy and its part on them. All of them add up over layers."""


def change_table(
    before: AdapterSet,
    after: AdapterSet,
    *,
    protected: Mapping[str, Tensor] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy task, layer, metric, before, after, of two sets with the same tasks and layers.

    Metrics: ``rank`` (directions above float32 rounding), measures of the spectrum, ``leakage`` where `protected` has
    a basis of the layer, ``relative_change`` (``‖ΔW' − ΔW‖ / ‖ΔW‖``, 0 before) and ``cosine`` of both updates (1
    before). The layer ``"total"`` has the sum of ranks, and norms, changes and leakage of all layers together. A
    measure of a zero update is NaN.

    Raises:
        ValueError: tasks or layers differ.

    >>> import torch
    >>> eye = torch.eye(3)
    >>> two = AdapterSet.from_factors({"a": {"x": (eye[:, :2] * torch.tensor([4.0, 3.0]), eye[:, :2])}})
    >>> one = AdapterSet.from_factors({"a": {"x": (4 * eye[:, :1], eye[:, :1])}})
    >>> table = change_table(two, one).query("layer == 'x'").set_index("metric")
    >>> table.loc[["rank", "frobenius", "relative_change", "cosine"], ["before", "after"]].to_numpy().round(2).tolist()
    [[2.0, 1.0], [5.0, 4.0], [0.0, 0.6], [1.0, 0.8]]
    """
    if before.tasks != after.tasks or set(before.layers) != set(after.layers):
        raise ValueError(f"{before!r} and {after!r} have different tasks or layers: nothing to compare")
    rows: list[Row] = []
    sums: list[tuple[str | float, ...]] = []
    for position, task in enumerate(before.tasks):
        sources = (replace(before.sources[position], task="before"), replace(after.sources[position], task="after"))
        pair = AdapterSet(sources, (None, None))
        basis_of = protected_bases(pair, protected)
        count, total = position * len(before.layers), len(before)
        step = None if progress is None else _shifted(progress, count, total)
        for batch in layer_batches(pair, memory_budget=memory_budget, progress=step):
            rows += ((task, *row) for row in _rows(batch))
            leaks = {(one.task, one.layer): float(one.components.sum()) for one in protected_energies(batch, basis_of)}
            sums += _sums(task, batch, leaks)
    table = pd.concat([pd.DataFrame(rows, columns=COLUMNS), _related(sums)], ignore_index=True)
    orders = {"task": before.tasks, "layer": [*before.layers, "total"], "metric": ORDER}
    return in_order(table, orders)


def _shifted(progress: Progress, count: int, total: int) -> Progress:
    return lambda done, _: progress(count + done, total)


def _rows(batch: LayerBatch) -> Iterator[tuple[str, str, float, float]]:
    """Layer, metric, before and after: rank and measures of the spectra."""
    for index, layer in enumerate(batch.layers):
        pair = []
        for update in batch.updates:
            rank = int(update.rank[index])
            sigma = update.values[index, :rank].numpy()
            known = {name: float(measure(sigma)) if rank else np.nan for name, measure in MEASURES.items()}
            norms = {} if rank else {"frobenius": 0.0, "spectral_norm": 0.0}
            pair.append({"rank": float(rank)} | known | norms)
        yield from ((layer, metric, pair[0][metric], pair[1][metric]) for metric in pair[0])


def _sums(task: str, batch: LayerBatch, leaks: Mapping[tuple[int, int], float]) -> Iterator[tuple[str | float, ...]]:
    """Task, layer and `SUMS`; `leaks` maps update and layer to the energy on protected directions."""
    first, second = batch.updates
    _, _, outputs, inputs = next(batch.decomposition.pairs())
    inner = (first.values[:, :, None] * outputs * inputs * second.values[:, None, :]).sum((1, 2))
    for index, layer in enumerate(batch.layers):
        energies = [float(update.energy[index]) for update in batch.updates]
        ranks = [float(update.rank[index]) for update in batch.updates]
        on = [leaks.get((update, index), np.nan) for update in (0, 1)]
        seen = [energy if known == known else np.nan for energy, known in zip(energies, on, strict=True)]
        yield (task, layer, *energies, float(inner[index]), *ranks, *seen, *on)


def _related(sums: Sequence[tuple[str | float, ...]]) -> pd.DataFrame:
    """Rows about both updates per layer, and about all layers together."""
    parts = pd.DataFrame(sums, columns=["task", "layer", *SUMS])
    totals = parts.groupby("task", sort=False)[SUMS].sum(min_count=1).reset_index().assign(layer="total")
    every = pd.concat([parts, totals], ignore_index=True)
    a, b, inner = every["a"], every["b"], every["inner"]
    known, both = a.where(a > 0), (a * b).where(a * b > 0)
    change = np.sqrt(np.maximum(a + b - 2 * inner, 0.0) / known)
    pairs = {
        "leakage": (every["leak_a"] / every["seen_a"], every["leak_b"] / every["seen_b"]),
        "relative_change": (0.0 * change, change),
        "cosine": (0.0 * known / known + 1.0, inner / both**0.5),
    }
    frames = [every.assign(metric=metric, before=old, after=new) for metric, (old, new) in pairs.items()]
    whole = every[every["layer"] == "total"]
    frames += [
        whole.assign(metric="rank", before=whole["rank_a"], after=whole["rank_b"]),
        whole.assign(metric="frobenius", before=whole["a"] ** 0.5, after=whole["b"] ** 0.5),
    ]
    rows = pd.concat(frames, ignore_index=True)[COLUMNS]
    return rows[(rows["metric"] != "leakage") | rows["before"].notna() | rows["after"].notna()]
