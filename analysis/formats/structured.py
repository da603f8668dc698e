"""Updates that are not simply two stored factors: products, rotations and scalings, some of them of the base weight."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.formats.base_updates import truncate
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import open_file
from analysis.formats.sources import Shape, Source
from analysis.formats.tensor_names import StoredLayer
from analysis.names import natural_key, unwrapped

Stored = Mapping[str, tuple[int, ...]]
"""Name of a tensor to its shape."""
Tensors = Mapping[str, Tensor]
"""Part of a layer's update, such as ``w1_a``, to its tensor in float64."""
Factors = tuple[Tensor, Tensor]
"""Left (m, r) and right (n, r) with ``ΔW = left rightᵀ``."""
Rule = Callable[[Tensors, Tensor], Factors]
"""Factors from a layer's tensors and its base weight (m, n), which is empty unless the update depends on it."""


@dataclass(frozen=True)
class StructuredLayer:
    """One layer's update: names of its tensors, its shape, and the rule that gives its factors."""

    parts: Mapping[str, str]
    shape: Shape
    rule: Rule
    relative: bool = False
    """Whether the update depends on the base weight."""
    leading: Callable[[int], Rule] | None = None
    """The rule for the leading part of some rank, if the factors are ``U diag(σ)`` and ``V`` with descending σ."""

    def limited(self, rank: int) -> "StructuredLayer":
        """The leading part of the update, of at most this rank."""
        m, n, r = self.shape
        if rank >= r:
            return self
        rule = partial(_truncated, self.rule, rank) if self.leading is None else self.leading(rank)
        return replace(self, shape=(m, n, rank), rule=rule)


def _truncated(rule: Rule, rank: int, tensors: Tensors, weight: Tensor) -> Factors:
    left, right = rule(tensors, weight)
    return truncate(left @ right.mT, rank)


@dataclass(frozen=True, kw_only=True, eq=False)
class StructuredAdapter(Source):
    """A `Source` whose factors are computed from a file and, where a layer needs it, from the base weight."""

    path: Path
    layers: Mapping[str, StructuredLayer]
    checkpoint: Checkpoint | None = None
    copies: frozenset[str] = frozenset()
    """Names of tensors that repeat others, such as factors that all layers share, or that are empty."""

    @property
    def file(self) -> str:
        """The file of the tensors."""
        return str(self.path)

    @property
    def names(self) -> set[str]:
        """Names of all tensors that are read, and of their copies."""
        return {*self.copies, *(name for layer in self.layers.values() for name in layer.parts.values())}

    def limited(self, rank: int) -> "StructuredAdapter":
        """The adapter with every update truncated to a rank."""
        layers = {name: layer.limited(rank) for name, layer in self.layers.items()}
        shapes = {name: layers[name].shape for name in self.shapes}
        return replace(self, layers=layers, shapes=shapes)

    def read(self, layers: Iterable[str]) -> Iterator[Factors]:
        """Left and right, one layer at a time from one opened file, computed in double precision."""
        file = open_file(self.path)
        for name in layers:
            layer = self.layers[name]
            weight = torch.empty(0, 0)
            if layer.relative and self.checkpoint is not None:
                m, n, _ = layer.shape
                weight = self.checkpoint.weight(name, (m, n), transposed=name in self.transposed).double()
            tensors = {part: file.read(stored).double() for part, stored in layer.parts.items()}
            left, right = (factor.float().contiguous() for factor in layer.rule(tensors, weight))
            if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                raise ValueError(f"{self.path}: the update of {name} is beyond float32, or not a number")
            yield left, right


def structured_adapter(
    task: str,
    kind: str,
    path: Path,
    layers: Mapping[str, StructuredLayer],
    *,
    checkpoint: Checkpoint | None = None,
    **values: Any,
) -> StructuredAdapter:
    """The adapter of `task` with these layers; `values` are further fields of `Source`."""
    shapes = {name: layer.shape for name, layer in layers.items()}
    descending = frozenset(name for name, layer in layers.items() if layer.leading)
    values = {"descending": descending, **values}
    return StructuredAdapter(
        task=task, kind=kind, path=path, shapes=shapes, layers=layers, checkpoint=checkpoint, **values
    )


def grouped_parts(path: Path, names: Iterable[str], ends: Mapping[str, str]) -> dict[str, StoredLayer]:
    """Layer to its tensors, in the order of the model, for names that end with one of `ends`, which maps to a part.

    Raises:
        ValueError: a layer or one of its parts occurs twice.
    """
    layers: dict[str, tuple[str, dict[str, str]]] = {}
    for name in names:
        stem, part = _split(name, ends)
        if not stem:
            continue
        first, parts = layers.setdefault(unwrapped(stem), (stem, {}))
        if first != stem:
            raise ValueError(f"{path}: {stem} and {first} are the same layer")
        if parts.setdefault(part, name) != name:
            raise ValueError(f"{path}: {name} and {parts[part]} are the same part of a layer")
    return {layer: StoredLayer(*layers[layer]) for layer in sorted(layers, key=natural_key)}


def _split(name: str, ends: Mapping[str, str]) -> tuple[str, str]:
    components = name.split(".")
    for count in (2, 1):  # the longer end first
        if len(components) > count and (part := ends.get(".".join(components[-count:]))):
            return ".".join(components[:-count]), part
    return "", ""


def needed(path: Path, parts: Mapping[str, str], *wanted: str) -> None:
    """Accept a layer that has all of the wanted parts; ValueError names those that are missing."""
    if missing := [part for part in wanted if part not in parts]:
        raise ValueError(f"{path}: no {', '.join(missing)} beside {', '.join(sorted(parts.values()))}")


def sizes(path: Path, stored: Stored, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor with this number of dimensions, none of them zero; ValueError otherwise."""
    shape = stored[name]
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{path}: {name} has shape {shape}, {dims} dimensions of at least 1 were expected")
    return shape


def unequal(path: Path, what: str, found: object, expected: object) -> ValueError:
    """The error for a size that does not fit."""
    return ValueError(f"{path}: {what} is {found}, {expected} was expected")


def base_shape(
    checkpoint: Checkpoint, layer: str, *, outputs: int = 0, inputs: int = 0, transposed: bool = False
) -> tuple[int, int]:
    """(m, n) of a layer's base weight, kernels flattened, from the checkpoint's header.

    Known `outputs` or `inputs` decide which way the weight is stored. Where both ways fit, it is (inputs, outputs) if
    `transposed`. ValueError if neither fits.
    """
    shape = checkpoint.shape(checkpoint.name_of(layer))
    m, n = shape[0], math.prod(shape[1:])
    ways = [(n, m), (m, n)] if transposed and len(shape) == 2 else [(m, n), (n, m)]
    for m, n in ways if len(shape) == 2 else ways[:1]:
        if outputs in (0, m) and inputs in (0, n):
            return m, n
    sides = f"{outputs or 'any number of'} outputs and {inputs or 'any number of'} inputs"
    raise ValueError(f"{checkpoint.path}: {layer} has shape {shape}, the adapter has {sides}: another base model?")


def full(change: Tensor) -> Factors:
    """Factors of a dense update: the matrix and an identity."""
    m, n = change.shape
    eye = torch.eye(min(m, n), dtype=change.dtype)
    return (change, eye) if n <= m else (eye, change.mT)


def needed_base(source: Path, method: str, checkpoint: Checkpoint | None) -> Checkpoint:
    """The base checkpoint; ValueError without one."""
    if checkpoint is None:
        remedy = "give the base checkpoint (base=)"
        raise ValueError(f"{source}: {method}'s update depends on the base weight: {remedy}")
    return checkpoint
