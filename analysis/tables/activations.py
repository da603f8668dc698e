"""Interference of updates, weighted by the second moments of their layers' inputs."""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import LayerBatch
from analysis.formats import Checkpoint

Covariances = Mapping[str, Mapping[str, Tensor]]
"""Task to layer to ``E[x xᵀ]`` (n, n), or a root of it (n, k)."""


def activation_rows(
    adapters: AdapterSet, batch: LayerBatch, covariances: Covariances, base: Checkpoint | None
) -> list[tuple[str | float, ...]]:
    """(task_a, task_b, metric, layer, numerator, a, b, chance, NaN, NaN) of every pair, on the inputs of task a."""
    rows: list[tuple[str | float, ...]] = []
    for (index, layer), (a, task_a) in product(enumerate(batch.layers), enumerate(batch.tasks)):
        if layer not in covariances.get(task_a, {}):
            continue
        moment = second_moment(covariances[task_a][layer].to(batch.rights), batch.n, f"{task_a}, {layer}")
        inputs = batch.input_rows(a, index)  # diag(σ) Vᵀ
        weighted = inputs @ moment
        own = (weighted * inputs).sum().item()
        if base is not None:
            weight = base.weight(layer, (batch.m, batch.n), transposed=layer in adapters.transposed).to(moment)
            before = ((weight @ moment) * weight).sum().item()
        for b in range(a + 1, len(batch.tasks)):
            later = batch.input_rows(b, index)
            drift = ((later @ moment) * later).sum().item()
            white = batch.updates[b].energy[index].item() * moment.trace().item() / batch.n
            outputs = batch.updates[a].left[index].mT @ batch.updates[b].left[index]
            inner = (weighted @ later.mT * outputs).sum().item()
            parts = {
                "activation_drift": (drift, white, white, white),
                "activation_alignment": (inner, own, drift, 0.0),
                **({} if base is None else {"activation_drift_relative": (drift, before, before, white)}),
            }
            for metric, numbers in parts.items():
                rows.append((task_a, batch.tasks[b], metric, layer, *numbers, torch.nan, torch.nan))
    return rows


def second_moment(given: Tensor, n: int, name: str) -> Tensor:
    """C (n, n) from itself, or from a root (n, k).

    Raises:
        ValueError: it has n rows in neither case, or is not symmetric.
    """
    if given.ndim != 2 or given.shape[0] != n:
        raise ValueError(f"{name}: the covariance has shape {tuple(given.shape)}, ({n}, {n}) or a root ({n}, k) needed")
    if given.shape[1] != n:
        return given @ given.mT
    if not torch.allclose(given, given.mT, rtol=1e-4, atol=1e-6 * given.abs().max().item()):  # float32 sums
        raise ValueError(f"{name}: the covariance is not symmetric; a square root of it is no covariance")
    return given
