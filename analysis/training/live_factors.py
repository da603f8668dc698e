"""Factors of the adapters in a model that is in memory, without the libraries that made them."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from analysis.names import natural_key, unwrapped

Pair = tuple[Tensor, Tensor]


def model_factors(model: nn.Module) -> dict[str, Pair]:
    """Layer to (left (m, r), right (n, r)) of the active adapters of a model, all scale in left, float32.

    Reads PEFT's LoRA layers (linear layers, convolutions, embeddings), and every module with a method ``factors()``
    that returns an object with ``left``, ``right`` and ``magnitude``, as the adapters of manifold_cl have it, or
    ``factors(name)`` for the names that its method ``active()`` returns. Several
    active adapters of a layer are summed: their columns stand side by side. Names leave out wrappers, as
    `AdapterSet` does.

    Raises:
        ValueError: the model has no such adapter, a layer has one of a method that is not read, factors are sharded,
            or they hold NaN.
    """
    found: dict[str, list[Pair]] = {}
    for name, module in model.named_modules():
        pairs = list(_pairs(name, module))
        if pairs:
            found.setdefault(unwrapped(name), []).extend(pairs)
    if not found:
        raise ValueError("the model has no adapter that can be read: PEFT's LoRA, or modules with factors()")
    factors = {}
    for layer in sorted(found, key=natural_key):
        lefts, rights = zip(*found[layer], strict=True)
        left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=1)
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise ValueError(f"{layer}: the factors contain NaN or infinite numbers; the run has diverged")
        factors[layer] = (left, right)
    return factors


def _pairs(name: str, module: Any) -> Iterator[Pair]:
    """The active pairs of factors of one module itself."""
    if hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "scaling"):
        yield from _lora(name, module)
    elif callable(getattr(module, "factors", None)):
        yield from _own(name, module)
    elif hasattr(module, "adapter_layer_names") and hasattr(module, "get_delta_weight"):
        raise ValueError(f"{name} is a {type(module).__module__}.{type(module).__name__}: only LoRA layers are read")


def _own(name: str, module: Any) -> Iterator[Pair]:
    if inspect.signature(module.factors).parameters:  # one pair per named adapter
        every = [module.factors(adapter) for adapter in module.active()]
    else:
        every = [module.factors()]
    for each in every:
        left, right = _whole(name, each.left), _whole(name, each.right)
        core = _whole(name, torch.as_tensor(each.magnitude))
        yield (left @ core if core.ndim == 2 else left * core), right


def _lora(name: str, module: Any) -> Iterator[Pair]:
    for adapter in module.active_adapters:
        if adapter in getattr(module, "lora_magnitude_vector", {}):
            remedy = "measure it from its saved folder, with the base checkpoint"
            raise ValueError(f"{name}: DoRA's update depends on the base weight: {remedy}")
        if adapter in module.lora_A:
            left, right = module.lora_B[adapter].weight, module.lora_A[adapter].weight
        elif adapter in getattr(module, "lora_embedding_A", {}):
            left, right = module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
        else:
            continue
        scaling = module.scaling[adapter]
        yield _whole(name, left).flatten(1) * scaling, _whole(name, right).flatten(1).mT.contiguous()


def _whole(name: str, tensor: Tensor) -> Tensor:
    """A detached copy in float32; ValueError for a tensor that other processes hold a part of."""
    if hasattr(tensor, "full_tensor") or tensor.numel() == 0:
        remedy = "measure saved checkpoints, or train with DDP"
        raise ValueError(f"{name}: its factors are sharded (FSDP or ZeRO), so they cannot be measured here: {remedy}")
    return tensor.detach().float()
