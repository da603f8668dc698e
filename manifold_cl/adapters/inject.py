"""The only code that edits a model's modules: adapters go in, and come out merged."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from manifold_cl.adapters.adapter import Adapter, Factors

Targets = str | Sequence[str]


def target_linears(model: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
    """The linear modules that ``targets`` name, in the model's order.

    Args:
        model: where to look.
        targets: suffixes of dotted names, matched at a dot (``"query"`` hits ``layer.0.attention.query``), or one
            regular expression for the whole name.

    Raises:
        ValueError: for a target that hits no linear module, with the nearest names, or one that is used in several
            places.
    """
    # The root has no name and no parent that could hold an adapter in its place.
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError("the model has no nn.Linear modules to adapt")
    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    if not targets:
        raise ValueError(f"no targets given: name the linear modules to adapt, such as {', '.join(endings[:6])}")
    if isinstance(targets, str):
        found = {name for name in linears if re.fullmatch(targets, name)}
        missed = [] if found else [targets]
    else:
        hits = {t: [name for name in linears if name == t or name.endswith(f".{t}")] for t in targets}
        found = {name for names in hits.values() for name in names}
        missed = [t for t, names in hits.items() if not names]
    if missed:
        names = list(dict.fromkeys([*endings, *linears]))
        near = difflib.get_close_matches(missed[0], names, n=3, cutoff=0.4) or endings[:6]
        hint = " (a string is one regular expression for the whole name; suffixes come in a list)"
        raise ValueError(
            f"no linear module matches target {', '.join(map(repr, missed))}; nearest: {', '.join(near)}"
            f"{hint if isinstance(targets, str) else ''}"
        )
    chosen = {name: linear for name, linear in linears.items() if name in found}
    places = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    if shared := [name for name, linear in chosen.items() if places.count(id(linear)) > 1]:
        raise ValueError(f"{shared[0]} is one module in several places: an adapter would replace only one; untie it")
    return chosen


def inject_adapters(
    model: nn.Module, targets: Targets, make: Callable[[str, nn.Linear], Adapter]
) -> dict[str, Adapter]:
    """Freeze the model and replace every target by the adapter that ``make(name, linear)`` returns.

    Nothing is changed when a target misses or ``make`` fails.

    Raises:
        ValueError: for a target without a match, or a model that already has adapters.
    """
    if present := adapters_of(model):
        raise ValueError(f"the model already has {len(present)} adapters: merge_adapters(model) first")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        adapters = {name: make(name, linear) for name, linear in target_linears(model, targets).items()}
    except BaseException:
        for p, flag in flags:  # an adapter freezes its base when it is made
            p.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        for parameter in (p for key, p in adapter.named_parameters() if not key.startswith("base.")):
            parameter.requires_grad_(True)
        _replace(model, name, adapter)
    return adapters


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in the model, by the name of the module they replaced."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def merge_adapters(model: nn.Module) -> dict[str, Factors]:
    """Add every adapter's update to its base weight, put the plain layers back, and return what was added."""
    added: dict[str, Factors] = {}
    for name, adapter in adapters_of(model).items():
        factors = adapter.factors()
        added[name] = Factors(factors.left.clone(), factors.right.clone(), factors.magnitude.clone())
        _replace(model, name, adapter.base)
    merge_factors(model, added)
    return added


@torch.no_grad()
def merge_factors(model: nn.Module, updates: Mapping[str, Factors]) -> None:
    """Add low-rank updates to the weights of the linear modules they are named after.

    Raises:
        ValueError: for a name that is no linear module here, or a shape that differs; nothing is added then.
    """
    modules = dict(model.named_modules())
    for name, factors in updates.items():
        module = modules.get(name)
        shape = (factors.left.shape[0], factors.right.shape[0])
        if not isinstance(module, nn.Linear):
            raise ValueError(f"the update names {name!r}, which is no linear module of this model")
        if tuple(module.weight.shape) != shape:
            raise ValueError(f"{name}: the update is {shape}, the weight {tuple(module.weight.shape)}")
    for name, factors in updates.items():
        weight = modules[name].weight
        assert isinstance(weight, torch.Tensor)
        weight.copy_(factors.added_to(weight))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
