"""Linear layers of a model: found by name without wrappers (PEFT's, torch's), and selected by targets.

For reading: hooks, sizes, weights. Modules are replaced in `inject`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import WrappedLinear, is_conv1d, is_linear, validate_base, validate_parent
from manifold_cl.rules import validate_kind

Targets = str | Sequence[str]

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear layers but the head of a transformers model; in plain torch no head is known."""
TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which wrappers of torch keep the wrapped module."""
HEADS = ("score", "classifier")
"""Heads of sequence classification, by PEFT's list."""
A_MODEL = "give the torch model itself, as the first argument"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and data parallelism; itself where there is no such wrapper.

    Raises:
        TypeError: for anything but a module.
    """
    validate_kind("model", model, nn.Module, remedy=A_MODEL)
    while (name := _transparent_child(model)) in TRANSPARENT or _is_parallel(model):
        model = cast(nn.Module, getattr(model, cast(str, name)))
    return model


def plain_name(name: str) -> str:
    """A dotted name without the parts that wrappers of torch put in."""
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, GPT-2's Conv1D among them, by name without wrappers, in the model's order.

    A layer that carries adapters counts once, with its adapters around it; their own matrices do not count.
    """
    validate_kind("model", model, nn.Module, remedy=A_MODEL)
    layers: dict[str, nn.Module] = {}
    for name, module in _walk(model, "", set()):
        layers.setdefault(name, module)
    return layers


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """As `named_layers`, but of a layer that carries adapters the layer inside."""
    return {name: require_linear(name, module) for name, module in named_layers(model).items()}


def adapter_chain(module: nn.Module) -> Iterator[nn.Module]:
    """The adapters around a layer, from the outermost to the layer itself."""
    inner: nn.Module | None = module
    while inner is not None:
        yield inner
        inner = _inner(inner)


def require_linear(name: str, module: nn.Module) -> nn.Module:
    """The linear layer that ``module`` is, or that its adapters are around; TypeError with the name without one."""
    inside = _linear_inside(module)
    if inside is None:
        raise TypeError(f"statistics are taken of linear layers, {name} is a {type(module).__name__}")
    return inside


def require_layers(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Layer name → `require_linear` of it; TypeError for a model, or a list of names, in place of such a table."""
    remedy = "give layer name → linear layer, as target_linears(model, targets) returns it"
    validate_kind("layers", layers, Mapping, remedy=remedy)
    return {name: require_linear(name, layer) for name, layer in layers.items()}


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight as (m, n), detached; GPT-2's is transposed, a quantised one is returned as stored."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.T if is_conv1d(layer) else weight


def device_of(layers: Mapping[str, nn.Module]) -> torch.device:
    """The device of the first layer."""
    return stored_weight(next(iter(layers.values()))).device


def target_linears(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear layers that ``targets`` select, for reading, by names without wrappers in the model's order.

    A layer with adapters counts as the layer inside. Targets and errors as in `target_layers`.

    >>> list(target_linears(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), ["2"]))
    ['2']
    """
    return _select(model, targets, named_linears(model))


def target_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear modules that ``targets`` select, GPT-2's Conv1D among them, in the model's order.

    Args:
        model: the model to search.
        targets: suffixes of dotted names, matched at a dot (``"query"`` hits ``layer.0.attention.query``), one
            regular expression for the whole name, or ``"all-linear"``: all, in a transformers model all but the head.

    Raises:
        ValueError: for a target that hits no linear module, with the nearest names, one that is used in several
            places, or one inside ``nn.MultiheadAttention``.
        TypeError: for a target that hits an embedding.
    """
    # The root has no name and no parent that could hold an adapter in its place.
    linears = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    return _select(model, targets, linears)


def _select(model: nn.Module, targets: Targets, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if not linears:
        raise ValueError("the model has no nn.Linear modules to adapt")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        heads = _prediction_heads(model)
        targets = [name for name in linears if name not in heads]
    endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
    if not targets:
        raise ValueError(f"no targets given: name the linear modules to adapt, such as {', '.join(endings[:6])}")
    hits = _matcher(targets)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and hits(name):
            try:
                validate_base(module)
            except TypeError as error:
                raise TypeError(f"target {name}: {error}") from None
    chosen = {name: linear for name, linear in linears.items() if hits(name)}
    reached = {target for name in chosen for target in hits(name)}
    missed = [targets] if isinstance(targets, str) else [target for target in targets if target not in reached]
    if not chosen or (missed and not isinstance(targets, str)):
        names = list(dict.fromkeys([*endings, *linears]))
        near = difflib.get_close_matches(str(missed[0]), names, n=3, cutoff=0.4) or endings[:6]
        hint = " (a string is one regular expression for the whole name; suffixes come in a list)"
        raise ValueError(
            f"no linear module matches target {', '.join(map(repr, missed))}; nearest: {', '.join(near)}"
            f"{hint if isinstance(targets, str) else ''}{_hint_of_adapters(model, hits)}"
        )
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    if shared := [name for name, linear in chosen.items() if uses[id(linear)] > 1]:
        raise ValueError(f"{shared[0]} is one module in several places: an adapter would replace only one; untie it")
    name_of = {id(linear): name for name, linear in chosen.items()}
    for attention in (module for module in model.modules() if isinstance(module, nn.MultiheadAttention)):
        for child in attention.children():
            if id(child) in name_of:
                validate_parent(attention, name_of[id(child)])
    return chosen


def _matcher(targets: Targets) -> Callable[[str], set[str]]:
    """A function from a module's name to the targets that hit it; its cost does not grow with their number."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"target {targets!r} is no regular expression ({error}): a string is one for the whole name; suffixes "
                "come in a list"
            ) from None
        return lambda name: {targets} if pattern.fullmatch(name) else set()
    wanted = set(targets)

    def hits(name: str) -> set[str]:
        parts = name.split(".")
        return wanted.intersection(".".join(parts[i:]) for i in range(len(parts)))

    return hits


def _hint_of_adapters(model: nn.Module, hits: Callable[[str], set[str]]) -> str:
    """A hint for targets that carry adapters already; empty where they do not."""
    bases = {id(module) for name, module in model.named_modules() if name.endswith((".base_layer", ".base"))}
    inside = [name for name, layer in named_linears(model).items() if id(layer) in bases]
    name = next(filter(hits, inside), None)
    return f"; {name} carries adapters already: merge them first, or pass the base model" if name else ""


def _prediction_heads(model: nn.Module) -> set[str]:
    """Names of the layers that ``"all-linear"`` leaves out: the output embedding, or a classification head."""
    base = model
    while (name := _transparent_child(base)) is not None:
        base = cast(nn.Module, getattr(base, name))
    output = getattr(base, "get_output_embeddings", lambda: None)()
    if output is None and hasattr(base, "config"):
        output = next((head for name in HEADS if isinstance(head := getattr(base, name, None), nn.Module)), None)
    inside = None if output is None else _linear_inside(output)
    return {name for name, layer in named_linears(model).items() if layer is inside}


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if _linear_inside(module) is not None:
        if prefix:  # the root has no name
            yield prefix, module
        return
    if (inner := _inner(module)) is not None:
        yield from _walk(inner, prefix, seen)
        return
    transparent = _transparent_child(module)
    for name, child in module.named_children():
        yield from _walk(child, prefix if name == transparent else f"{prefix}.{name}".lstrip("."), seen)


def _linear_inside(module: nn.Module) -> nn.Module | None:
    return next(filter(is_linear, adapter_chain(module)), None)


def _inner(module: nn.Module) -> nn.Module | None:
    """The module that an adapter is around: ours, one of PEFT's, or the copy that PEFT trains whole."""
    name = module.base_name if isinstance(module, WrappedLinear) else "base_layer"
    if isinstance(base := getattr(module, name, None), nn.Module):
        return base
    copies, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
    if isinstance(copies, nn.ModuleDict) and original is not None:
        active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
        return copies[active[0]] if active else cast(nn.Module, original)
    return None


def _transparent_child(module: nn.Module) -> str | None:
    """The name of the child that counts as the module itself."""
    for name in TRANSPARENT:
        if name in module._modules:
            return name
    if _is_parallel(module):
        return "module"
    classes = {cls.__name__ for cls in type(module).__mro__}  # by name: PEFT is not a requirement
    if classes & {"PeftModel", "PeftMixedModel"}:
        return "base_model"
    return "model" if "BaseTuner" in classes else None


def _is_parallel(module: nn.Module) -> bool:
    return isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
