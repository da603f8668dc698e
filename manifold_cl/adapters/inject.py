"""The only code that edits a model's modules: adapters go in, and come out merged."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from manifold_cl.adapters.adapter import Adapter, Factors
from manifold_cl.adapters.bases import check_base, check_parent, is_linear, plain_weight, sides
from manifold_cl.adapters.eblora import EBLoRALinear, Protected

Targets = str | Sequence[str]


def target_linears(model: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
    """The `nn.Linear` modules that ``targets`` name, in the model's order; see `target_layers`."""
    return _targets(model, targets, lambda module: isinstance(module, nn.Linear))


def target_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear modules that ``targets`` name, GPT-2's Conv1D among them, in the model's order.

    Args:
        model: where to look.
        targets: suffixes of dotted names, matched at a dot (``"query"`` hits ``layer.0.attention.query``), or one
            regular expression for the whole name.

    Raises:
        ValueError: for a target that hits no linear module, with the nearest names, or one that is used in several
            places.
        TypeError: for a target that hits an embedding.
    """
    return _targets(model, targets, is_linear)


def _targets(model: nn.Module, targets: Targets, wanted: Callable[[nn.Module], bool]) -> dict[str, Any]:
    # The root has no name and no parent that could hold an adapter in its place.
    linears = {name: module for name, module in model.named_modules() if name and wanted(module)}
    if not linears:
        raise ValueError("the model has no nn.Linear modules to adapt")
    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    if not targets:
        raise ValueError(f"no targets given: name the linear modules to adapt, such as {', '.join(endings[:6])}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and any(_hits(t, name) for t in _listed(targets)):
            try:
                check_base(module)
            except TypeError as error:
                raise TypeError(f"target {name}: {error}") from None
    missed = [t for t in _listed(targets) if not any(_hits(t, name) for name in linears)]
    if missed:
        names = list(dict.fromkeys([*endings, *linears]))
        shown = [targets] if isinstance(targets, str) else missed
        near = difflib.get_close_matches(str(shown[0]), names, n=3, cutoff=0.4) or endings[:6]
        hint = " (a string is one regular expression for the whole name; suffixes come in a list)"
        raise ValueError(
            f"no linear module matches target {', '.join(map(repr, shown))}; nearest: {', '.join(near)}"
            f"{hint if isinstance(targets, str) else ''}"
        )
    chosen = {name: linear for name, linear in linears.items() if any(_hits(t, name) for t in _listed(targets))}
    places = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    if shared := [name for name, linear in chosen.items() if places.count(id(linear)) > 1]:
        raise ValueError(f"{shared[0]} is one module in several places: an adapter would replace only one; untie it")
    return chosen


def inject_adapters(model: nn.Module, targets: Targets, make: Callable[[str, Any], Adapter]) -> dict[str, Adapter]:
    """Freeze the model and replace every target by the adapter that ``make(name, layer)`` returns.

    `eblora_adapters` gives a ``make`` for the usual case. Nothing is changed when a target misses or ``make`` fails.

    Raises:
        ValueError: for a target without a match, one whose weight another module shares or reads past it, or a model
            that already has adapters.
        TypeError: for a target that is an embedding.
    """
    if present := adapters_of(model):
        raise ValueError(f"the model already has {len(present)} adapters: merge_adapters(model) first")
    for name in target_layers(model, targets):
        check_parent(model.get_submodule(name.rpartition(".")[0]), name)
        refuse_tied(model, name)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        adapters = {name: make(name, layer) for name, layer in target_layers(model, targets).items()}
    except BaseException:
        for p, flag in flags:  # an adapter freezes its base when it is made
            p.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        for key, parameter in adapter.named_parameters():
            parameter.requires_grad_(not key.startswith("base."))
        _replace(model, name, adapter)
    return adapters


def refuse_tied(model: nn.Module, name: str) -> None:
    """Refuse a layer whose weight is another module's as well: merging an update would change both.

    Raises:
        ValueError: naming the other.
    """
    weight = model.get_submodule(name).weight
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is weight and other != f"{name}.weight":
            raise ValueError(
                f"{name} shares its weight with {other.removesuffix('.weight')}, which a merged update would change "
                "too: leave it out of the targets, or untie it (in transformers, tie_word_embeddings=False)"
            )


def eblora_adapters(
    *,
    rank: int,
    memory: Mapping[str, Protected] | None = None,
    output_memory: Mapping[str, Protected] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Callable[[str, nn.Module], EBLoRALinear]:
    """A ``make`` for `inject_adapters`: balanced adapters of one rank, each off what its layer protects.

    Args:
        rank: r.
        memory: layer name → protected input subspace, such as a `SubspaceMemory`; layers without an entry are free.
        output_memory: the same for output sides.
        generator: draws all random starts, in the model's order.
        options: more keywords of `EBLoRALinear`.

    Raises:
        ValueError: when a layer's memory leaves no room for the rank; the message names the layer.
    """

    def make(name: str, layer: nn.Module) -> EBLoRALinear:
        try:
            return EBLoRALinear(
                layer,
                rank,
                complement=None if memory is None else memory.get(name),
                output_complement=None if output_memory is None else output_memory.get(name),
                generator=generator,
                **options,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    return make


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in the model, by the name of the module they replaced."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def merge_adapters(model: nn.Module) -> dict[str, Factors]:
    """Add every adapter's update to its base weight, put the plain layers back, and return what was added.

    Raises:
        TypeError: for a quantised base; nothing is changed then.
    """
    added: dict[str, Factors] = {}
    adapters = adapters_of(model)
    for adapter in adapters.values():
        plain_weight(adapter.base, to="merge into")
    for name, adapter in adapters.items():
        adapter.unmerge()
        factors = adapter.factors()
        added[name] = Factors(factors.left.clone(), factors.right.clone(), factors.magnitude.clone())
        _replace(model, name, adapter.base)
    merge_factors(model, added)
    return added


@torch.no_grad()
def merge_factors(model: nn.Module, updates: Mapping[str, Factors]) -> None:
    """Add low-rank updates to the weights of the linear modules they are named after.

    Raises:
        ValueError: for a name that is no linear module here, a shape that differs, or a weight that another module
            shares; nothing is added then.
        TypeError: for a quantised weight.
    """
    modules = dict(model.named_modules())
    weights = {}
    for name, factors in updates.items():
        module = modules.get(name)
        shape = (factors.left.shape[0], factors.right.shape[0])
        if module is None or not is_linear(module):
            raise ValueError(f"the update names {name!r}, which is no linear module of this model")
        if sides(module) != shape:
            raise ValueError(f"{name}: the update is {shape}, the weight {sides(module)}")
        refuse_tied(model, name)
        weights[name] = plain_weight(module, to="merge into")
    for name, factors in updates.items():
        weights[name].copy_(factors.added_to(weights[name]))


def _listed(targets: Targets) -> Sequence[str | re.Pattern[str]]:
    return [re.compile(targets)] if isinstance(targets, str) else targets


def _hits(target: str | re.Pattern[str], name: str) -> bool:
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    return name == target or name.endswith(f".{target}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
