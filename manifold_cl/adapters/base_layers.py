"""Linear layers that adapters wrap: kinds, shapes, weights, and weights that several modules share."""

from __future__ import annotations

from abc import ABC
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

WIDE = (torch.float32, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2, with a weight of layout (in, out); by name, without an import."""
    return any(cls.__name__ == "Conv1D" and hasattr(module, "nf") for cls in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can wrap this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def validate_base(base: nn.Module) -> None:
    """Raise TypeError for a module that is not linear, such as an embedding, or whose weight is computed."""
    if isinstance(base, nn.Embedding | nn.EmbeddingBag):
        raise TypeError(
            f"adapters wrap linear layers, got {type(base).__name__}: an embedding looks rows up and has no input "
            "directions to protect; train it whole (modules_to_save in PEFT) or leave it out of the targets"
        )
    if not is_linear(base):
        raise TypeError(f"adapters wrap nn.Linear (or GPT-2's Conv1D), got {type(base).__name__}")
    validate_stored(base)


def validate_stored(base: nn.Module) -> None:
    """Raise TypeError for a weight that each forward pass computes: a merged update would be overwritten."""
    if "weight" in base._parameters or "weight" in base._buffers:
        return
    sources = [name for name, _ in base.named_parameters() if name not in ("bias",)]
    raise TypeError(
        f"the weight of this {type(base).__name__} is computed from {', '.join(sources) or 'other tensors'} at each "
        "forward pass (parametrization, weight_norm, spectral_norm or pruning), so a merged update would be lost: make "
        "the weight permanent first, with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), "
        "remove_weight_norm, remove_spectral_norm or prune.remove"
    )


def validate_parent(parent: nn.Module, child: str) -> None:
    """Raise ValueError for a layer whose parent uses the weight directly, so that an adapter would be skipped.

    That is torch's attention, and its encoder layer while that may take a fast path.
    """
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{child} is inside nn.MultiheadAttention, which multiplies by its weight without calling it: an adapter "
            "would never act; leave it out of the targets, or use an attention module made of linear layers"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"{child} is inside nn.TransformerEncoderLayer, which in evaluation multiplies by its weight without "
            "calling it: call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def sides(base: nn.Module) -> tuple[int, int]:
    """(m, n) = (outputs, inputs), however the weight is stored."""
    if is_conv1d(base):
        return cast(int, base.nf), cast(Tensor, base.weight).shape[0]
    linear = cast(nn.Linear, base)
    return linear.out_features, linear.in_features


def plain_weight(base: nn.Module, *, to: str) -> Tensor:
    """The weight as (m, n), a view; GPT-2's is transposed. ``to`` says what it is wanted for.

    TypeError for a quantised weight, which has no entries to read or to add to, or a computed one.
    """
    validate_plain_weight(base, to=to)
    weight = cast(Tensor, base.weight)
    return weight.T if is_conv1d(base) else weight


def validate_plain_weight(base: nn.Module, *, to: str, name: str = "") -> None:
    """Raise the errors of `plain_weight`, with the layer's name where one is given."""
    validate_stored(base)
    if is_quantised(base):
        raise TypeError(
            f"{name or type(base).__name__} is quantised ({cast(Tensor, base.weight).dtype}): an adapter works on top "
            f"of it, but there is no plain weight to {to}. Load the model in bfloat16 for that, or export the adapter"
        )


def is_quantised(base: nn.Module) -> bool:
    """Whether the weight is packed: integers, eight-bit floats, or another shape than the layer's sides."""
    weight = cast(Tensor, base.weight)
    m, n = sides(base)
    entries = weight.is_floating_point() and weight.element_size() > 1
    return not entries or tuple(weight.shape) != ((n, m) if is_conv1d(base) else (m, n))


class WrappedLinear(nn.Module, ABC):
    """A module around a linear layer, whose own tensors stay float32 or wider.

    ``model.to(torch.bfloat16)`` and ``model.half()`` convert the layer inside only: on a frame rounding costs 1e-3.
    """

    base_name: ClassVar[str]
    """Name of the child that is the linear layer."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.dtype in WIDE and result.is_floating_point() and result.dtype not in WIDE:
                return tensor.to(result.device) if tensor.device.type != "meta" else result.to(tensor.dtype)
            return result

        if recurse:
            for name, child in self.named_children():
                cast(Any, child)._apply(fn if name == self.base_name else keep_wide)
        cast(Any, nn.Module)._apply(self, keep_wide, recurse=False)
        return self


def shared_tensors(model: nn.Module) -> dict[str, str]:
    """Every parameter or buffer that shares memory with another, with the name of one such other.

    One parameter under two names counts, and so do views of one storage, as after ``a.weight.data = b.weight.data``.
    Views without common entries, such as the slices of a fused weight, do not. A tensor without memory of its own
    (meta, sharded) is compared by identity only. O(P log P) for P tensors.
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
    for on_device in spans.values():
        end, owner = 0, ""
        for start, stop, name in sorted(on_device):
            if start < end:
                others.setdefault(name, owner)
                others.setdefault(owner, name)
            if stop > end:
                end, owner = stop, name
    return others


def validate_untied(model: nn.Module, weights: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError for layers whose weight is another module's as well: a merge would change both.

    ``weights`` are pairs: name of the layer, name of its weight in the model.
    """
    others = shared_tensors(model)
    for layer, weight in weights:
        if weight in others:
            raise ValueError(tied_message(layer, others[weight]))


def tied_message(layer: str, other: str) -> str:
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
