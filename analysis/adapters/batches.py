"""Layers of equal shapes as one batch, within a budget of memory."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet

MEMORY = 2**31
"""Bytes that a batch may take, 2 GiB: what is needed does not grow with the number of layers."""
COPIES = 48
"""Bytes a number of the factors takes: float64, and six of it alive at the height of the products, as measured."""

Progress = Callable[[int, int], None]
"""Called with the layers that are done and all of them."""


def layer_batches(
    adapters: AdapterSet, *, memory: int = MEMORY, progress: Progress | None = None
) -> Iterator[tuple[str, ...]]:
    """Groups of layers whose factors have equal shapes task by task, of at most `memory` bytes in all tasks.

    A single layer is taken even where it needs more.
    """
    limit = max(1, memory // COPIES)
    groups: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
    shapes = [source.shapes for source in adapters.sources]
    for layer in adapters.layers:
        groups.setdefault(tuple(found[layer] for found in shapes), []).append(layer)
    done, total = 0, len(adapters.layers)
    for group, layers in groups.items():
        size = max(1, limit // max(1, sum((m + n) * r for m, n, r in group)))
        for start in range(0, len(layers), size):
            batch = tuple(layers[start : start + size])
            yield batch
            done += len(batch)
            if progress is not None:
                progress(done, total)


def stacked_factors(
    adapters: AdapterSet, layers: Sequence[str], *, device: torch.device | str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Left (L, m, r) and right (L, n, r) of every task, on the device."""
    lefts, rights = [], []
    for task in adapters.tasks:
        found = list(adapters.read(task, layers))
        lefts.append(torch.stack([factors.left for factors in found]).to(device=device, dtype=dtype))
        rights.append(torch.stack([factors.right for factors in found]).to(device=device, dtype=dtype))
    return lefts, rights
