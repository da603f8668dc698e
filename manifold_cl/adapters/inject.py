"""Adapters put into a model and merged out of it: the only code that replaces a model's modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.adapter_geometry import validate_on_manifolds
from manifold_cl.adapters.base_layers import (
    is_linear,
    plain_weight,
    sides,
    validate_base,
    validate_parent,
    validate_untied,
)
from manifold_cl.adapters.eblora import EBLoRALinear
from manifold_cl.adapters.frozen_updates import keep_factors
from manifold_cl.adapters.layers import Targets, adapter_chain, named_layers, target_layers, unwrapped
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.merging import losses_together, merge_into
from manifold_cl.adapters.options import Protected, validate_memory
from manifold_cl.linalg import is_finite
from manifold_cl.lists import listed
from manifold_cl.rules import described


def inject_adapters(model: nn.Module, targets: Targets, make: Callable[[str, Any], Adapter]) -> dict[str, Adapter]:
    """Freeze the model and replace every target by the adapter that ``make(name, layer)`` returns.

    `eblora_adapters` gives a ``make`` for the usual case. An adapter is in training or evaluation mode as its layer is.
    Nothing is changed when a target misses or ``make`` fails.

    Args:
        model: without adapters.
        targets: suffixes of names, one regular expression, or ``"all-linear"`` (all but a transformers head).
        make: called with the name and the linear layer.

    Raises:
        ValueError: for a target without a match, one whose weight another module shares or uses directly, or a model
            that already has adapters, of PEFT too. What ``make`` raises names the layer.
        TypeError: for a target that is an embedding, or a ``make`` that is no such function.

    >>> model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> list(inject_adapters(model, ["0", "2"], eblora_adapters(rank=2)))
    ['0', '2']
    """
    model = unwrapped(model)
    if present := adapters_of(model):
        raise ValueError(f"the model already has {len(present)} adapters: merge_adapters(model) first")
    layers = target_layers(model, targets)
    if of_peft := [name for name, layer in named_layers(model).items() if len(list(adapter_chain(layer))) > 1]:
        raise ValueError(
            f"{of_peft[0]} carries PEFT's adapters, which would be frozen: give the base model, or what "
            "model.merge_and_unload() returns"
        )
    for name, layer in layers.items():
        validate_parent(model.get_submodule(name.rpartition(".")[0]), name)
        try:
            validate_base(layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    validate_untied(model, ((name, f"{name}.weight") for name in layers))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        adapters = {name: _made(make, name, layer) for name, layer in layers.items()}
    except BaseException:
        for p, flag in flags:  # an adapter freezes its base when it is made
            p.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        adapter.train(layers[name].training)  # no dropout in a model that evaluates
        for key, parameter in adapter.named_parameters():
            parameter.requires_grad_(not key.startswith("base."))
        _replace(model, name, adapter)
    return adapters


def eblora_adapters(
    *,
    rank: int,
    memory: Mapping[str, Protected] | None = None,
    output_memory: Mapping[str, Protected] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Callable[[str, nn.Module], EBLoRALinear]:
    """A ``make`` for `inject_adapters`: `EBLoRALinear` of one rank, each outside its layer's protected subspace.

    Args:
        rank: r.
        memory: layer name → protected input subspace, such as a `SubspaceMemory`; None as an entry leaves it free.
        output_memory: the same for output sides.
        generator: for all random starts, in the model's order.
        **options: of `EBLoRAOptions`.

    Raises:
        ValueError: when a layer's memory leaves no room for the rank, or has no entry for a layer, which would be
            unprotected; the message names the layer.
        TypeError: for a memory that is no mapping.

    >>> make = eblora_adapters(rank=2, memory={"0": torch.eye(6)[:, :3]}, initial_scale=-0.01)
    >>> make("0", nn.Linear(6, 4)).right_manifold.k
    3
    """
    memories = {"memory": memory, "output_memory": output_memory}
    for key, given in memories.items():
        if given is not None:
            validate_memory(key, given)

    def make(name: str, layer: nn.Module) -> EBLoRALinear:
        for key, given in memories.items():
            if given is not None and name not in given:
                raise ValueError(
                    f"{name}: {key} has no entry for this layer, which would be unprotected (it has {listed(given)}): "
                    "make it from the same targets, or give None as its entry"
                )
        inputs, outputs = (None if given is None else given[name] for given in memories.values())
        try:
            return EBLoRALinear(
                layer, rank, complement=inputs, output_complement=outputs, generator=generator, **options
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    return make


def _made(make: Callable[[str, Any], Adapter], name: str, layer: nn.Module) -> Adapter:
    """The adapter of a layer; an error of ``make`` begins with the layer's name."""
    if isinstance(make, type) or not callable(make):
        raise TypeError(
            f"make is a function of a layer's name and the layer, got {described(make)}: give "
            "eblora_adapters(rank=...), or lambda name, layer: EBLoRALinear(layer, rank)"
        )
    try:
        adapter = make(name, layer)
    except (TypeError, ValueError) as error:
        if not str(error).startswith(f"{name}: "):
            error.args = (f"{name}: {error}",)
        raise
    if not isinstance(adapter, Adapter):
        raise TypeError(f"make returned {described(adapter)} for {name}: give an adapter, such as an EBLoRALinear")
    return adapter


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The injected adapters, by the name of the module they replaced.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> adapters_of(model)
    {}
    >>> _ = inject_adapters(model, ["0"], eblora_adapters(rank=2))
    >>> adapters_of(model)["0"].rank
    2
    """
    return {name: module for name, module in unwrapped(model).named_modules() if isinstance(module, Adapter)}


def merge_adapters(model: nn.Module, *, merged_dtype: torch.dtype | None = None) -> dict[str, Factors]:
    """Add every adapter's update to its base weight, put the plain layers back, and return the updates.

    ``merged_dtype`` is the precision of the merged weights, as in `merge_factors`.

    Raises:
        TypeError: for a quantised or computed base weight.
        ValueError: for a model without adapters, frames off their manifolds, factors that are not finite, or a weight
            that another module shares. Nothing is changed in any of these cases.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> _ = inject_adapters(model, ["0"], eblora_adapters(rank=2))
    >>> merge_adapters(model)["0"].rank, model
    (2, Sequential(
      (0): Linear(in_features=6, out_features=4, bias=True)
    ))
    """
    adapters = _injected(model, "merge_adapters", instead="model.merge_and_unload()")
    model = unwrapped(model)
    validate_on_manifolds(model, to="merge")
    for adapter in adapters.values():
        plain_weight(adapter.base, to="merge into")
    validate_untied(model, ((name, f"{name}.base.weight") for name in adapters))
    updates = _take_out(model, adapters)
    _merge(model, updates, merged_dtype)
    return updates


def keep_adapters(model: nn.Module) -> dict[str, Factors]:
    """Put the plain layers back, let every adapter's update act beside its frozen weight, and return the updates.

    The outputs are those of `merge_adapters` before rounding. Weights are neither read nor changed, so a quantised
    base is allowed; see `keep_factors`.

    Raises:
        ValueError: for a model without adapters, frames off their manifolds, or factors that are not finite. Nothing
            is changed then.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> _ = inject_adapters(model, ["0"], eblora_adapters(rank=2))
    >>> x = torch.ones(1, 6)
    >>> before, _ = model(x), keep_adapters(model)
    >>> type(model[0]).__name__, torch.allclose(model(x), before)
    ('Linear', True)
    """
    adapters = _injected(model, "keep_adapters", instead="a new adapter per task, with model.base_model.set_adapter")
    model = unwrapped(model)
    validate_on_manifolds(model, to="keep")
    updates = _take_out(model, adapters)
    keep_factors(model, updates)
    return updates


def _injected(model: nn.Module, call: str, *, instead: str) -> dict[str, Adapter]:
    """The adapters of a model; ValueError for none, or for PEFT's, which are not taken out here."""
    if hasattr(model, "peft_config"):
        raise ValueError(f"{call} takes adapters of inject_adapters, and this model has PEFT's: use {instead}")
    if not (adapters := adapters_of(unwrapped(model))):
        raise ValueError(f"{call}: the model has no adapters, or they have been merged already")
    return adapters


def _take_out(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Factors]:
    """Replace adapters by the layers inside, and return their updates."""
    updates = {name: adapter.factors().clone() for name, adapter in adapters.items()}
    _validate_finite(updates)
    for name, adapter in adapters.items():
        adapter.unmerge()
        _replace(model, name, adapter.base)
    return updates


def merge_factors(model: nn.Module, updates: Mapping[str, Factors], *, merged_dtype: torch.dtype | None = None) -> None:
    """Add low-rank updates to the weights of the linear modules they are named after.

    ``merged_dtype`` is the new precision of these layers' weights and biases; their own if None. A typical update is
    smaller than half a step of bfloat16, so most of it is lost there, with a warning. Layers of another precision than
    the model's activations need ``torch.autocast``.

    Raises:
        ValueError: for a name that is no linear module here, a shape that differs, a weight that another module
            shares, or an update that is not finite; nothing is added then.
        TypeError: for a quantised or computed weight.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> before = model[0].weight.clone()
    >>> merge_factors(model, {"0": Factors(torch.eye(2), torch.eye(3, 2), torch.tensor(2.0))})
    >>> (model[0].weight - before).round().tolist()
    [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    """
    model = unwrapped(model)
    modules = dict(model.named_modules())
    _validate_finite(updates)
    for name, factors in updates.items():
        module = modules.get(name)
        shape = (factors.left.shape[0], factors.right.shape[0])
        if module is None or not is_linear(module):
            raise ValueError(f"the update names {name!r}, which is no linear module of this model")
        if sides(module) != shape:
            raise ValueError(f"{name}: the update is {shape}, the weight {sides(module)}")
        plain_weight(module, to="merge into")
    validate_untied(model, ((name, f"{name}.weight") for name in updates))
    _merge(model, updates, merged_dtype)


def _merge(model: nn.Module, updates: Mapping[str, Factors], merged_dtype: torch.dtype | None) -> None:
    with losses_together():
        for name, factors in updates.items():
            merge_into(model.get_submodule(name), [factors], layer=name, merged_dtype=merged_dtype)


def _validate_finite(updates: Mapping[str, Factors]) -> None:
    for name, factors in updates.items():
        for part in ("left", "right", "magnitude"):
            if not is_finite(getattr(factors, part)):
                raise ValueError(f"{name}: {part} holds NaN or infinite values: the adapter is damaged, train it again")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
