"""A model's linear layers by the names they have without wrappers: PEFT's, torch.compile's, those of data parallelism.

Layers are found for reading: hooks, sizes, weights. What edits a model's modules is in `inject`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.bases import is_conv1d, is_linear

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear layers but the head that makes predictions."""
TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which wrappers of torch keep what they wrap."""
HEADS = ("score", "classifier")
"""Heads of sequence classification, by PEFT's list."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and data parallelism; itself where there is no such wrapper."""
    while (name := _passed(model)) in TRANSPARENT or _is_parallel(model):
        model = cast(nn.Module, getattr(model, cast(str, name)))
    return model


def plain_name(name: str) -> str:
    """A dotted name without the parts that wrappers of torch put in."""
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, GPT-2's Conv1D among them, by name without wrappers, in the model's order.

    A layer that carries adapters counts once, with its adapters around it; their own matrices do not count.
    """
    found: dict[str, nn.Module] = {}
    for name, module in _walk(model, "", set()):
        found.setdefault(name, module)
    return found


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """As `named_layers`, but of a layer that carries adapters the layer inside."""
    return {name: require_linear(name, module) for name, module in named_layers(model).items()}


def shells(module: nn.Module) -> Iterator[nn.Module]:
    """The module, what it is around, and so on: the adapters of a layer from the outermost to the layer itself."""
    inner: nn.Module | None = module
    while inner is not None:
        yield inner
        inner = _inner(inner)


def linear_inside(module: nn.Module) -> nn.Module | None:
    """The linear layer that this module is, or that its adapters are around; None where there is none."""
    return next(filter(is_linear, shells(module)), None)


def require_linear(name: str, module: nn.Module) -> nn.Module:
    """The linear layer in ``module``.

    Raises:
        TypeError: there is none; with the name.
    """
    inside = linear_inside(module)
    if inside is None:
        raise TypeError(f"statistics are taken of linear layers, {name} is a {type(module).__name__}")
    return inside


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight as (m, n), detached; GPT-2's is transposed, a quantised one is what is stored."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.T if is_conv1d(layer) else weight


def device_of(layers: Mapping[str, nn.Module]) -> torch.device:
    """Where the first of the layers lies."""
    return stored_weight(next(iter(layers.values()))).device


def heads(model: nn.Module) -> set[str]:
    """Names of the layers that ``"all-linear"`` leaves out: the output embedding, or a classification head."""
    base = model
    while (name := _passed(base)) is not None:
        base = cast(nn.Module, getattr(base, name))
    output = getattr(base, "get_output_embeddings", lambda: None)()
    if output is None and hasattr(base, "config"):
        output = next((head for name in HEADS if isinstance(head := getattr(base, name, None), nn.Module)), None)
    inside = None if output is None else linear_inside(output)
    return {name for name, layer in named_linears(model).items() if layer is inside}


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if linear_inside(module) is not None:
        if prefix:  # the root has no name
            yield prefix, module
        return
    if (inner := _inner(module)) is not None:
        yield from _walk(inner, prefix, seen)
        return
    passed = _passed(module)
    for name, child in module.named_children():
        yield from _walk(child, prefix if name == passed else f"{prefix}.{name}".lstrip("."), seen)


def _inner(module: nn.Module) -> nn.Module | None:
    """What an adapter is around: ours, one of PEFT's, or the copy that PEFT trains whole."""
    if isinstance(module, Adapter):
        return module.base
    if isinstance(base := getattr(module, "base_layer", None), nn.Module):
        return base
    if isinstance(copies := getattr(module, "modules_to_save", None), nn.ModuleDict) and hasattr(
        module, "original_module"
    ):
        active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
        return copies[active[0]] if active else cast(nn.Module, module.original_module)
    return None


def _passed(module: nn.Module) -> str | None:
    """The name of the child that counts as the module itself."""
    for name in TRANSPARENT:
        if name in module._modules:
            return name
    classes = {cls.__name__ for cls in type(module).__mro__}
    if _is_parallel(module):
        return "module"
    if classes & {"PeftModel", "PeftMixedModel"}:  # told by name: PEFT is not a requirement
        return "base_model"
    return "model" if "BaseTuner" in classes else None


def _is_parallel(module: nn.Module) -> bool:
    return isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
