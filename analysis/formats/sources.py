"""Updates of one task: names and shapes in memory, factors on demand."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from analysis.formats.files import TensorFile, open_file
from analysis.names import natural_key

RECENT = 4
"""Tensors that are kept while experts are read: both factors of two parameters."""
Shape = tuple[int, int, int]
"""(m, n, r): outputs, inputs, rank."""


class LeftOut(NamedTuple):
    """A part of a file that is not read, or that is no part of the update."""

    file: str
    tensor: str
    """Name of the tensor, or of the layer; empty for a file as a whole."""
    reason: str
    task: str = ""
    """The task that the file belongs to, known once the tasks have their names."""


class BareParameter(NamedTuple):
    """The parameter of a module that holds a layer's weight, such as one expert's matrix of a stack."""

    module: str
    parameter: str
    expert: int
    """Number of the expert, from 0."""
    experts: int
    """Number of all experts of the parameter."""
    depth: int
    """Number of wrappers that PEFT puts around this parameter's."""
    flipped: bool
    """Whether PEFT takes the parameter's inputs for its outputs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(ABC):
    """One task's update: names and shapes, and factors on demand."""

    task: str
    kind: str
    """Method of the update, such as ``"eblora"`` or ``"lora"``; ``"dense"`` for a difference of checkpoints."""
    shapes: Mapping[str, Shape]
    """Layer name to (m, n, r), in the order of the model."""
    base: str | None = None
    """Name of the base model, where the files give it."""
    transposed: frozenset[str] = frozenset()
    """Layers known to have a base weight stored (inputs, outputs); the update is outputs times inputs anyway."""
    embeddings: frozenset[str] = frozenset()
    """Layers known to be embeddings, whose weight is stored (inputs, outputs) with one-hot inputs."""
    tied: frozenset[str] = frozenset()
    """Embeddings known to be the model's output too."""
    parameters: Mapping[str, BareParameter] = field(default_factory=dict)
    """Layers whose weight is no module of its own: a bare parameter of a module, or one expert of it."""
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers known to be convolutions, with the sizes of their kernels, such as (3, 3); n is inputs times positions."""
    descending: frozenset[str] = frozenset()
    """Layers whose factors are ``U diag(σ)`` and ``V`` with orthonormal columns and descending σ."""
    notices: tuple[str, ...] = ()
    """Phrases that name the contents of the files beside the update, and assumptions about them."""
    left_out: tuple[LeftOut, ...] = ()
    """Every part of the files that is not in the update."""

    @property
    def file(self) -> str:
        """The file that the update is read from; empty for factors in memory."""
        return ""

    @abstractmethod
    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left (m, r) with all scale in it and right (n, r), float32, for each of `layers`."""

    def picked(self, layers: Iterable[str], *notices: str, reason: str = "") -> Self:
        """The update of some layers, with further notices; `reason` says why the other layers are left out."""
        shapes = {layer: self.shapes[layer] for layer in layers}
        lost = (LeftOut(self.file, layer, reason) for layer in self.shapes if layer not in shapes)
        return replace(self, shapes=shapes, notices=(*self.notices, *notices), left_out=(*self.left_out, *lost))

    def limited(self, rank: int) -> "Source":
        """The update with each layer's part of high rank truncated; stored factors stay as they are."""
        return self

    def noting(self, notices: Iterable[str], left_out: Iterable[LeftOut] = ()) -> Self:
        """The same update with further notices and entries of what is left out."""
        return replace(self, notices=(*self.notices, *notices), left_out=(*self.left_out, *left_out))

    def relabelled(self, names: Mapping[str, str], notice: str) -> "Relabelled":
        """The update with other names of layers: new name to present name, in the order of `names`.

        `notice` is completed by an example.
        """
        name, own = next((name, own) for name, own in names.items() if name != own)
        values = self.values()
        values["shapes"] = {name: self.shapes[own] for name, own in names.items()}
        for key in ("transposed", "embeddings", "tied", "descending"):
            values[key] = frozenset(name for name, own in names.items() if own in values[key])
        values["parameters"] = {name: self.parameters[own] for name, own in names.items() if own in self.parameters}
        values["kernels"] = {name: self.kernels[own] for name, own in names.items() if own in self.kernels}
        values["notices"] += (f"{notice}, such as {own} for {name}",)
        return Relabelled(**values, original=self, names=names)

    def split(self, blocks: Mapping[str, Sequence[tuple[str, int]]]) -> "Split":
        """The update with some layers in blocks of rows: layer to the blocks' names and numbers of outputs."""
        shapes: dict[str, Shape] = {}
        rows: dict[str, tuple[str, int]] = {}
        for layer, (m, n, r) in self.shapes.items():
            start = 0
            for name, outputs in blocks.get(layer, [(layer, m)]):
                shapes[name] = (outputs, n, r)
                rows[name] = (layer, start)
                start += outputs
        values = self.values() | {"shapes": shapes}
        values["transposed"] = frozenset(name for name, (own, _) in rows.items() if own in self.transposed)
        values["kernels"] = {name: self.kernels[own] for name, (own, _) in rows.items() if own in self.kernels}
        values["descending"] = self.descending.difference(blocks)  # rows of orthonormal columns are not orthonormal
        layer = next(iter(blocks))
        names = " and ".join(name for name, _ in blocks[layer])
        values["notices"] += (f"layers are split as in another task, such as {layer} into {names}",)
        return Split(**values, original=self, rows=rows)

    def values(self) -> dict[str, Any]:
        """The fields that all sources have, with their values."""
        return {each.name: getattr(self, each.name) for each in fields(Source)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Relabelled(Source):
    """A `Source` whose layers have other names."""

    original: Source
    names: Mapping[str, str]

    @property
    def file(self) -> str:
        """The original's file."""
        return self.original.file

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right of the original's layers."""
        return self.original.read([self.names[layer] for layer in layers])


@dataclass(frozen=True, kw_only=True, eq=False)
class Split(Source):
    """A `Source` some of whose layers are blocks of rows of one layer, such as queries, keys and values."""

    original: Source
    rows: Mapping[str, tuple[str, int]]
    """Layer to the original's layer and the first of its rows."""

    @property
    def file(self) -> str:
        """The original's file."""
        return self.original.file

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right, each layer of the original read once for neighbouring blocks."""
        layers = list(layers)
        owners = [self.rows.get(layer, (layer, 0)) for layer in layers]
        distinct = [own for own, _ in groupby(own for own, _ in owners)]
        updates = zip(distinct, self.original.read(distinct), strict=True)
        own, (left, right) = "", (torch.empty(0), torch.empty(0))
        for layer, (owner, start) in zip(layers, owners, strict=True):
            if owner != own:
                own, (left, right) = next(updates)
            yield left[start : start + self.shapes[layer][0]], right


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldAdapter(Source):
    """A `Source` whose factors are in memory."""

    factors: Mapping[str, tuple[Tensor, Tensor]]

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right in float32."""
        for layer in layers:
            left, right = self.factors[layer]
            yield left.detach().float(), right.detach().float()


def held_adapter(task: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> HeldAdapter:
    """The update of `task` with these factors: left (m, r) and right (n, r)."""
    shapes = {
        name: (left.shape[0], right.shape[0], left.shape[1])
        for name, (left, right) in sorted(factors.items(), key=lambda item: natural_key(item[0]))
    }
    return HeldAdapter(task=task, kind="factors", shapes=shapes, factors=factors)


@dataclass(frozen=True)
class LayerTensors:
    """Names of the tensors that hold one layer's factors.

    `core` stands between the factors: a number, a diagonal (r,) or a matrix (r, r). Kernels of convolutions are
    flattened to matrices; a wide right factor is stored (r, n). A compensated `start` is subtracted in columns of its
    own: the rank in `shape` counts both.
    """

    left: str
    right: str
    shape: Shape
    scaling: float
    core: str | None = None
    right_is_wide: bool = False
    start: "LayerTensors | None" = None
    expert: tuple[int, int] | None = None
    """Number of one expert and of all, whose factors are stacked: by rows of right, by every nth column of left."""
    flipped: bool = False
    """Whether left and right change places, since the file takes inputs for outputs."""

    @classmethod
    def find(
        cls,
        path: Path,
        stored: Mapping[str, tuple[int, ...]],
        names: Mapping[str, str],
        *,
        scaling: float = 1.0,
        alpha: float | None = None,
        kernels: bool = False,
    ) -> "LayerTensors":
        """The tensors of a file by part: ``left``, ``right`` or ``wide_right``, ``core``, ``start_left``, ...

        `stored` maps all names to shapes. The scaling is ``alpha / r`` if alpha is given. With `kernels`, factors may
        be those of a convolution, (m, r, 1, 1) and (r, n, height, width). ValueError for shapes that do not fit.
        """
        wide = "wide_right" in names
        sides = ("left", "wide_right" if wide else "right")
        if missing := [side for side in sides if side not in names]:
            raise ValueError(f"{path}: no {missing[0]} factor beside {', '.join(names.values())}")
        sizes: list[tuple[int, int]] = []
        for side in sides:
            shape = stored[names[side]]
            inner = 1 if side == "left" else math.prod(shape[2:])
            if len(shape) < 2 or (len(shape) > 2 and not kernels) or math.prod(shape[2:]) != inner:
                raise ValueError(f"{path}: {names[side]} has shape {shape}, a matrix was expected")
            rows, columns = shape[0], math.prod(shape[1:])
            sizes.append((columns, rows) if side == "wide_right" else (rows, columns))
        ((m, r), (n, rank)), (left, right) = sizes, (names[side] for side in sides)
        if len(stored[left]) != len(stored[right]):
            beside = f"a matrix was expected beside {left} of shape {stored[left]}, or kernels in both"
            raise ValueError(f"{path}: {right} has shape {stored[right]}, {beside}")
        if r != rank:
            if kernels and len(stored[left]) > 2 and r and rank % r == 0:
                problem = f"{left} is of a convolution in {rank // r} groups, which is not read"
                raise ValueError(f"{path}: {problem}: its shape is {stored[left]}, that of {right} {stored[right]}")
            raise ValueError(f"{path}: {left} has rank {r}, {right} has rank {rank}")
        if 0 in (m, n, r):
            raise ValueError(f"{path}: {left} and {right} have (m, n, r) {(m, n, r)}: at least 1 of each was expected")
        scaling = scaling if alpha is None else alpha / r
        core = names.get("core")
        if core is not None and stored[core] not in ((), (1,), (r,), (r, r)):
            raise ValueError(f"{path}: {core} has shape {stored[core]}, expected a number, ({r},) or ({r}, {r})")
        starting = {part.removeprefix("start_"): name for part, name in names.items() if part.startswith("start_")}
        start = cls.find(path, stored, starting, scaling=scaling) if starting else None
        if start is not None and start.shape != (m, n, r):
            raise ValueError(f"{path}: {start.left} and {start.right} have (m, n, r) {start.shape}, not {(m, n, r)}")
        shape = (m, n, r if start is None else 2 * r)
        return cls(left, right, shape, scaling, core, wide, start)

    @property
    def names(self) -> list[str]:
        """Names of all tensors that are read."""
        own = [name for name in (self.left, self.right, self.core) if name is not None]
        return own if self.start is None else own + self.start.names

    def read(self, file: TensorFile) -> tuple[Tensor, Tensor]:
        """Left and right; O((m + n) r²) with a full core."""
        left, right = (file.read(name).flatten(1) for name in (self.left, self.right))
        if self.expert is not None:
            index, count = self.expert
            left, right = left[:, index::count], right.view(count, -1, right.shape[1])[index]
        if self.core is not None:
            core = file.read(self.core)
            left = left @ core if core.ndim == 2 else left * core
        left, right = left * self.scaling, (right.mT if self.right_is_wide else right).contiguous()
        if self.flipped:
            left, right = right, left
        if self.start is None:
            return left, right
        start_left, start_right = self.start.read(file)
        return torch.cat([left, -start_left], dim=1), torch.cat([right, start_right], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter(Source):
    """A `Source` that reads a file on demand; `shapes_of` gives its shapes."""

    path: Path
    layers: Mapping[str, LayerTensors]

    @property
    def file(self) -> str:
        """The file of the factors."""
        return str(self.path)

    @property
    def names(self) -> set[str]:
        """Names of all tensors that are read."""
        return {name for layer in self.layers.values() for name in layer.names}

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right, one layer at a time from one opened file."""
        file = open_file(self.path)
        if self.parameters:
            file = file.keeping(RECENT)  # the experts of one parameter share their tensors
        for layer in layers:
            left, right = self.layers[layer].read(file)
            if not torch.isfinite(left).all():
                product = f"factor times scale {self.layers[layer].scaling:g}"
                raise ValueError(f"{self.path}: {layer}, {product} is beyond float32: check the scaling")
            yield left, right


def kernels_of(layers: Mapping[str, LayerTensors], stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Layer to the sizes of its kernel, for the layers that are convolutions."""
    return {layer: stored[tensors.right][2:] for layer, tensors in layers.items() if len(stored[tensors.right]) > 2}


def shapes_of(layers: Mapping[str, LayerTensors]) -> dict[str, Shape]:
    """Layer name to (m, n, r)."""
    return {layer: tensors.shape for layer, tensors in layers.items()}
