"""One task's update, wherever it lies: names, shapes and, on demand, factors."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from analysis.formats.files import open_tensors, read_tensor
from analysis.names import natural_key

Shape = tuple[int, int, int]
"""(m, n, r): outputs, inputs, rank."""


class Source(Protocol):
    """One task's update: names, shapes and, on demand, factors."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def kind(self) -> str:
        """What made the update, such as ``"eblora"`` or ``"lora"``."""

    @property
    def base(self) -> str | None:
        """Name of the model that the update belongs to, where the files say it."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r), in the order of the model."""

    @property
    def transposed(self) -> frozenset[str]:
        """Layers known to have a base weight stored (inputs, outputs); the update is outputs times inputs anyway."""

    @property
    def embeddings(self) -> frozenset[str]:
        """Layers known to be embeddings, whose weight is stored (inputs, outputs) with one-hot inputs."""

    @property
    def tied(self) -> frozenset[str]:
        """Embeddings known to be the model's output too."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the files hold beside the update, and what was assumed of them, a phrase each."""

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left (m, r) with all scale in it and right (n, r), float32, for each of `layers`."""


@dataclass(frozen=True)
class HeldAdapter:
    """A `Source` whose factors are already in memory."""

    task: str
    factors: Mapping[str, tuple[Tensor, Tensor]]
    kind: str = "factors"
    base: str | None = None
    transposed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return {
            name: (left.shape[0], right.shape[0], left.shape[1])
            for name, (left, right) in sorted(self.factors.items(), key=lambda item: natural_key(item[0]))
        }

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right in float32."""
        for layer in layers:
            left, right = self.factors[layer]
            yield left.detach().float(), right.detach().float()


@dataclass(frozen=True)
class Entry:
    """Where the factors of one layer lie in a file.

    `core` names what stands between the factors: a number, a diagonal (r,) or a matrix (r, r). Factors of
    convolutions are flattened to matrices; a wide factor is transposed. A compensated `start` is subtracted, in
    columns of its own: the rank in `shape` counts both.
    """

    left: str
    right: str
    shape: Shape
    scaling: float
    core: str | None = None
    right_is_wide: bool = False
    start: "Entry | None" = None


@dataclass(frozen=True)
class StoredAdapter:
    """A `Source` that reads a file when asked."""

    task: str
    kind: str
    path: Path
    entries: Mapping[str, Entry]
    base: str | None = None
    transposed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right, one layer at a time from one opened file."""
        with open_tensors(self.path) as file:
            for layer in layers:
                entry = self.entries[layer]
                left, right = self._factors(file, entry)
                if entry.start is not None:
                    start_left, start_right = self._factors(file, entry.start)
                    left, right = torch.cat([left, -start_left], dim=1), torch.cat([right, start_right], dim=1)
                if not torch.isfinite(left).all():
                    raise ValueError(
                        f"{self.path}: {layer}, factor times scale {entry.scaling:g} is beyond float32: "
                        "is the scaling of the configuration right?"
                    )
                yield left, right

    def _factors(self, file: Any, entry: Entry) -> tuple[Tensor, Tensor]:
        left = read_tensor(file, self.path, entry.left).flatten(1)
        right = read_tensor(file, self.path, entry.right).flatten(1)
        if entry.core is not None:
            core = read_tensor(file, self.path, entry.core)
            left = left @ core if core.ndim == 2 else left * core
        return left * entry.scaling, (right.mT if entry.right_is_wide else right).contiguous()


@dataclass(frozen=True)
class _Forwarding:
    """A `Source` that shows another one in part, under another name, or with other names of layers."""

    whole: Source

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.whole.task

    @property
    def kind(self) -> str:
        """What made the update."""
        return self.whole.kind

    @property
    def base(self) -> str | None:
        """Name of the model that the update belongs to."""
        return self.whole.base

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return self.whole.shapes

    @property
    def transposed(self) -> frozenset[str]:
        """Layers whose base weight is stored (inputs, outputs)."""
        return self.whole.transposed

    @property
    def embeddings(self) -> frozenset[str]:
        """Layers that are embeddings."""
        return self.whole.embeddings

    @property
    def tied(self) -> frozenset[str]:
        """Embeddings that are the model's output too."""
        return self.whole.tied

    @property
    def notices(self) -> tuple[str, ...]:
        """What the files hold beside the update."""
        return self.whole.notices

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right of the source that is shown."""
        return self.whole.read(layers)


@dataclass(frozen=True)
class PickedAdapter(_Forwarding):
    """Some layers of a `Source`."""

    layers: tuple[str, ...]
    more_notices: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r) of the picked layers."""
        shapes = self.whole.shapes
        return {layer: shapes[layer] for layer in self.layers}

    @property
    def notices(self) -> tuple[str, ...]:
        """What the files hold beside the update, and what was not picked."""
        return (*self.whole.notices, *self.more_notices)


@dataclass(frozen=True)
class RenamedAdapter(_Forwarding):
    """A `Source` under another task's name."""

    name: str

    @property
    def task(self) -> str:
        """The name given to the task."""
        return self.name


@dataclass(frozen=True)
class RelabelledAdapter(_Forwarding):
    """A `Source` whose layers have other names, in the order of `names`: name that is shown to the source's own."""

    names: Mapping[str, str]

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r), by the names that are shown."""
        shapes = self.whole.shapes
        return {name: shapes[own] for name, own in self.names.items()}

    @property
    def transposed(self) -> frozenset[str]:
        """Layers whose base weight is stored (inputs, outputs)."""
        return frozenset(name for name, own in self.names.items() if own in self.whole.transposed)

    @property
    def embeddings(self) -> frozenset[str]:
        """Layers that are embeddings."""
        return frozenset(name for name, own in self.names.items() if own in self.whole.embeddings)

    @property
    def tied(self) -> frozenset[str]:
        """Embeddings that are the model's output too."""
        return frozenset(name for name, own in self.names.items() if own in self.whole.tied)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the files hold beside the update, and an example of the names that were matched."""
        name, own = next((name, own) for name, own in self.names.items() if name != own)
        return (*self.whole.notices, f"layers have other names than in the first task, such as {own} for {name}")

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right of the layers with these names."""
        return self.whole.read([self.names[layer] for layer in layers])
