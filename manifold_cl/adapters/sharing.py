"""Weights that share memory: a merged update of one would change the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def shared_tensors(model: nn.Module) -> dict[str, str]:
    """Every parameter or buffer that shares memory with another, with the name of one such other.

    One parameter under two names counts, and so do views of one storage, as ``a.weight.data = b.weight.data`` makes
    them. Views that share a storage without touching, as the slices of a fused weight do, do not. A tensor without
    memory of its own (meta, sharded) is compared by identity only. O(P log P) for P tensors.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    others: dict[str, str] = {}
    by_id: dict[int, list[str]] = defaultdict(list)
    spans: dict[torch.device, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in named:
        by_id[id(tensor)].append(name)
        if (span := _span(tensor)) is not None:
            spans[tensor.device].append((*span, name))
    for names in by_id.values():
        others.update(zip(names, [*names[1:], names[0]], strict=True) if len(names) > 1 else ())
    for found in spans.values():
        end, owner = 0, ""
        for start, stop, name in sorted(found):
            if start < end:
                others.setdefault(name, owner)
                others.setdefault(owner, name)
            if stop > end:
                end, owner = stop, name
    return others


def refuse_tied(model: nn.Module, weights: Iterable[tuple[str, str]]) -> None:
    """Refuse layers whose weight is another module's as well: merging an update would change both.

    Args:
        model: where to look.
        weights: (name of the layer, name of its weight in the model).

    Raises:
        ValueError: naming the layer and the other.
    """
    others = shared_tensors(model)
    for layer, weight in weights:
        if weight in others:
            raise ValueError(tied(layer, others[weight]))


def tied(layer: str, other: str) -> str:
    """The message about a layer whose weight is also the tensor named ``other``."""
    owner = other.removesuffix(".weight").removesuffix(".base").removesuffix(".base_layer")
    return (
        f"{layer} shares its weight with {owner}, which a merged update would change too: leave it out of the "
        "targets, or untie it (in transformers, tie_word_embeddings=False)"
    )


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """First and last byte address that the tensor covers; None where it has no memory of its own."""
    data = tensor.data
    if type(data) is not Tensor or data.device.type == "meta" or data.layout != torch.strided or not data.numel():
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
    start = data.data_ptr()
    return start, start + extent * data.element_size()
