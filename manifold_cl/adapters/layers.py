"""A model's linear layers by the names they have without wrappers: PEFT's, torch.compile's, those of data parallelism.

Layers are found for reading: hooks, sizes, weights. What edits a model's modules is in `inject`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.base_layers import is_conv1d, is_linear, validate_base

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


Targets = str | Sequence[str]


def target_linears(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear layers that ``targets`` name, to be read: by the names they have without wrappers, in their order.

    Wrappers of PEFT, ``torch.compile`` and data parallelism are looked through, and a layer with adapters counts as the
    layer inside. Otherwise as `target_layers`.
    """
    return _targets(model, targets, named_linears(model))


def target_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear modules that ``targets`` name, GPT-2's Conv1D among them, in the model's order.

    Args:
        model: where to look.
        targets: suffixes of dotted names, matched at a dot (``"query"`` hits ``layer.0.attention.query``), one
            regular expression for the whole name, or ``"all-linear"``: all but the head that makes predictions.

    Raises:
        ValueError: for a target that hits no linear module, with the nearest names, or one that is used in several
            places.
        TypeError: for a target that hits an embedding.
    """
    # The root has no name and no parent that could hold an adapter in its place.
    linears = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    return _targets(model, targets, linears)


def _targets(model: nn.Module, targets: Targets, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        left_out = heads(model)
        targets = [name for name in linears if name not in left_out]
    if not linears:
        raise ValueError("the model has no nn.Linear modules to adapt")
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
            f"{hint if isinstance(targets, str) else ''}{_carried(model, hits)}"
        )
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    if shared := [name for name, linear in chosen.items() if places[id(linear)] > 1]:
        raise ValueError(f"{shared[0]} is one module in several places: an adapter would replace only one; untie it")
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
    return lambda name: wanted.intersection(_suffixes(name))


def _carried(model: nn.Module, hits: Callable[[str], set[str]]) -> str:
    """A hint for targets that carry adapters already; empty where they do not."""
    places = {id(module) for name, module in model.named_modules() if name.endswith((".base_layer", ".base"))}
    inside = [n for n, layer in named_linears(model).items() if id(layer) in places]
    carried = next(filter(hits, inside), None)
    return f"; {carried} carries adapters already: merge them first, or pass the base model" if carried else ""


def _suffixes(name: str) -> Iterator[str]:
    """The name and its endings at a dot: ``a.b.c``, ``b.c``, ``c``."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name
