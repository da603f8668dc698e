"""Factors of bare parameters (PEFT's ``target_parameters``): one matrix per expert of a three-dimensional weight."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.formats.checkpoints import Checkpoint
from analysis.formats.sources import BareParameter, LayerTensors, Shape
from analysis.formats.tensor_names import StoredLayer
from analysis.names import listed, matched_names

WRAPPED = ".base_layer"
"""Component that PEFT adds per further parameter of one module."""
GATED = ("gate_up_proj", "down_proj")
"""Parameters of the experts in transformers: the first has twice the second's inputs as outputs."""


class Bare(NamedTuple):
    """The factors of one parameter, for all experts together."""

    module: str
    parameter: str
    depth: int
    """Number of wrappers around this one."""
    flipped: bool
    """Whether the parameter is stored (inputs, outputs), which PEFT takes for (outputs, inputs)."""

    @property
    def key(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.parameter}"


def bare_parameters(
    path: Path,
    config: Path,
    targets: Any,
    layers: Mapping[str, StoredLayer],
    stored: Mapping[str, tuple[int, ...]],
    base: Checkpoint | None,
) -> dict[str, Bare]:
    """The layers of a PEFT file that are bare parameters: name in the file to the parameter.

    A file names the module only. Which factors belong to which of its parameters follows from the shapes: those of
    `base`, or of `GATED`. ValueError if they do not tell.
    """
    if not targets:
        return {}
    if not isinstance(targets, list) or not all(isinstance(target, str) and "." in target for target in targets):
        raise ValueError(
            f"{config}: 'target_parameters' is {targets!r:.80}, a list of names of parameters was expected"
        )
    modules: dict[str, list[str]] = {}
    for layer in layers:
        module = layer
        while module.endswith(WRAPPED):
            module = module.removesuffix(WRAPPED)
        names = {target.rpartition(".")[2] for target in targets if _ends_with(module, target.rpartition(".")[0])}
        if names:
            modules.setdefault(module, []).append(layer)
    bare = {}
    for module, stems in modules.items():
        stems.sort(key=len)  # the outermost wrapper first
        names = {target.rpartition(".")[2] for target in targets if _ends_with(module, target.rpartition(".")[0])}
        sizes = [_sizes(stored, layers[stem]) for stem in stems]
        named = zip(stems, _named(path, module, names, sizes, base), strict=True)
        for depth, (stem, (parameter, flipped)) in enumerate(named):
            bare[stem] = Bare(module, parameter, depth, flipped)
    return bare


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _sizes(stored: Mapping[str, tuple[int, ...]], layer: StoredLayer) -> tuple[int, int]:
    """Outputs and inputs of one expert's matrix, as PEFT has them."""
    left, right = (stored[layer.parts[part]] if part in layer.parts else () for part in ("left", "wide_right"))
    return (left[0], right[1]) if len(left) == len(right) == 2 else (0, 0)


def _named(
    path: Path, module: str, names: set[str], sizes: Sequence[tuple[int, int]], base: Checkpoint | None
) -> Sequence[tuple[str, bool]]:
    """The parameter of each of a module's factors, and whether it is stored (inputs, outputs)."""
    if len(sizes) == len(names) == 1:
        return [(next(iter(names)), False)]
    if names == set(GATED) and len(sizes) == 2:
        for first in (0, 1):
            (m, n), (outputs, inputs) = sizes[first], sizes[1 - first]
            for flipped, fits in ((False, (m, n) == (2 * inputs, outputs)), (True, (m, n) == (inputs, 2 * outputs))):
                if fits:
                    return [(GATED[abs(first - position)], flipped) for position in (0, 1)]
    possible = []
    for order in itertools.permutations(sorted(names)) if base is not None and len(sizes) == len(names) else ():
        shapes = [_base_shape(base, f"{module}.{name}") for name in order] if base is not None else []
        if all(sorted(shape) == sorted(size) for shape, size in zip(shapes, sizes, strict=True)):
            possible.append(order)
    if len(possible) == 1:
        return [(name, False) for name in possible[0]]
    problem = "and the file does not say which is whose"
    if base is None:
        problem += ": give the base checkpoint (base=), whose shapes decide it"
    raise ValueError(
        f"{path}: {module} has {len(sizes)} pairs of factors for {listed(sorted(names))} (target_parameters), {problem}"
    )


def _base_shape(base: Checkpoint, name: str) -> tuple[int, ...]:
    """The last two sizes of a parameter of the base model; none if it is missing."""
    own = matched_names([name], base.shapes).get(name)
    return () if own is None else base.shapes[own][-2:]


def experts_of(
    path: Path,
    bare: Bare,
    tensors: StoredLayer,
    stored: Mapping[str, tuple[int, ...]],
    rank: float,
    scaling: float,
) -> Iterator[tuple[str, LayerTensors, BareParameter]]:
    """Each expert's name, tensors and origin; ValueError for factors whose sizes are no multiple of the rank."""
    whole = LayerTensors.find(path, stored, tensors.parts, scaling=scaling)
    m, n, stacked = whole.shape
    if stacked % rank:
        raise ValueError(f"{path}: {bare.key} has factors of {stacked} columns, no multiple of the rank {rank:g}")
    r, count = int(rank), int(stacked // rank)
    shape: Shape = (n, m, r) if bare.flipped else (m, n, r)
    name = bare.module if bare.parameter == "weight" else bare.key
    for index in range(count):
        own = name if count == 1 else f"{bare.module}.{index}.{bare.parameter}"
        expert = replace(whole, shape=shape, expert=(index, count), flipped=bare.flipped)
        yield own, expert, BareParameter(bare.module, bare.parameter, index, count, bare.depth, bare.flipped)


def stacked_experts(
    updates: Mapping[str, tuple[Tensor, Tensor]], parameters: Mapping[str, BareParameter]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """PEFT's tensors of updates of bare parameters, and the rank of each parameter.

    All experts of a parameter have its largest rank: smaller ones, and experts without an update, are filled with
    zeros. Tensors are ``lora_A`` (experts · r, n) and ``lora_B`` (m, r · experts), in PEFT's order of experts.
    """
    stacks: dict[tuple[str, str], dict[int, tuple[Tensor, Tensor]]] = {}
    origins: dict[str, dict[str, BareParameter]] = {}
    for layer, (left, right) in updates.items():
        origin = parameters[layer]
        factors = (right, left) if origin.flipped else (left, right)
        stacks.setdefault((origin.module, origin.parameter), {})[origin.expert] = factors
        origins.setdefault(origin.module, {})[origin.parameter] = origin
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, own in origins.items():
        for depth, origin in enumerate(sorted(own.values(), key=lambda each: each.depth)):
            stack = stacks[module, origin.parameter]
            rank = max(left.shape[1] for left, _ in stack.values())
            left, right = next(iter(stack.values()))
            a, b = torch.zeros(origin.experts, rank, len(right)), torch.zeros(len(left), rank, origin.experts)
            for index, (left, right) in stack.items():
                a[index, : right.shape[1]], b[:, : left.shape[1], index] = right.mT, left
            stem = f"base_model.model.{module}{WRAPPED * depth}.lora_"
            tensors |= {f"{stem}A.weight": a.flatten(0, 1), f"{stem}B.weight": b.flatten(1)}
            ranks[f"{module}.{origin.parameter}"] = rank
    return tensors, ranks
