"""Layers of equal shapes as one batch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from analysis.adapters import AdapterSet

LIMIT = 2**26
"""Numbers read at once, 0.5 GB in float64: a batch, not the whole set, has to fit into memory."""


def layer_batches(adapters: AdapterSet, *, limit: int = LIMIT) -> Iterator[tuple[str, ...]]:
    """Groups of layers whose factors have equal shapes task by task, of at most `limit` numbers in all tasks."""
    groups: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
    for layer in adapters.layers:
        shapes = tuple(adapters.shape(task, layer) for task in adapters.tasks)
        groups.setdefault(shapes, []).append(layer)
    for shapes, layers in groups.items():
        size = max(1, limit // max(1, sum((m + n) * r for m, n, r in shapes)))
        for start in range(0, len(layers), size):
            yield tuple(layers[start : start + size])


def stacked_factors(
    adapters: AdapterSet, layers: tuple[str, ...], *, device: torch.device | str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Left (L, m, r) and right (L, n, r) of every task, on the device."""
    lefts, rights = [], []
    for task in adapters.tasks:
        found = list(adapters.read(task, layers))
        lefts.append(torch.stack([factors.left for factors in found]).to(device=device, dtype=dtype))
        rights.append(torch.stack([factors.right for factors in found]).to(device=device, dtype=dtype))
    return lefts, rights
