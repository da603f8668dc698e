"""Where factors come from: memory, our adapter folders and protected subspaces."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r), in the order of the model."""

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left (m, r) with all scale in it and right (n, r), float32, for each of `layers`."""


@dataclass(frozen=True)
class HeldAdapter:
    """A `Source` whose factors are already in memory."""

    task: str
    factors: Mapping[str, tuple[Tensor, Tensor]]
    kind: str = "factors"

    @property
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
    """Where the factors of one layer lie in a safetensors file."""

    left: str
    right: str
    shape: Shape
    scaling: float
    scale: str | None = None
    right_is_wide: bool = False


@dataclass(frozen=True)
class StoredAdapter:
    """A `Source` that reads a safetensors file when asked."""

    task: str
    kind: str
    path: Path
    entries: Mapping[str, Entry]

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right, one layer at a time from one opened file."""
        with open_tensors(self.path) as file:
            for layer in layers:
                entry = self.entries[layer]
                left, right = _tensor(file, self.path, entry.left), _tensor(file, self.path, entry.right)
                scale = entry.scaling
                if entry.scale is not None:
                    scale *= float(_tensor(file, self.path, entry.scale))
                yield left * scale, (right.mT if entry.right_is_wide else right).contiguous()


@dataclass(frozen=True)
class StoredBases:
    """Protected subspaces of one task's end: layer name to orthonormal columns, read when asked."""

    path: Path
    shapes: Mapping[str, tuple[int, int]]

    def basis(self, layer: str) -> Tensor | None:
        """(n, k) in float32, or None for a layer without a protected subspace."""
        if layer not in self.shapes:
            return None
        with open_tensors(self.path) as file:
            return _tensor(file, self.path, f"{layer}.basis")


def open_tensors(path: Path) -> Any:
    """A safetensors file opened lazily.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _tensor(file: Any, path: Path, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name).float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} contains NaN or infinite numbers; the run has diverged")
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def _manifest(path: Path, expected: str, tensors: Path) -> dict[str, Any]:
    """The manifest of one of our files, once format, version and checksum agree."""
    manifest = read_json(path)
    check_format(path, manifest, expected)
    if not tensors.is_file():
        raise FileNotFoundError(f"{tensors} does not exist, though {path.name} describes it")
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != manifest.get("sha256"):
        raise ValueError(
            f"{tensors}: sha256 is {digest}, the manifest says {manifest.get('sha256')}; the file was truncated, "
            "edited or belongs to another manifest"
        )
    if not isinstance(manifest.get("layers"), dict):
        raise ValueError(f"{path}: key 'layers' is missing or not an object")
    return manifest


def _check_shape(path: Path, name: str, shape: tuple[int, ...] | None, said: Any) -> tuple[int, int]:
    """The shape of a stored matrix, once the manifest agrees with it."""
    expected = said.get(name.rpartition(".")[2]) if isinstance(said, dict) else said
    if shape is None or len(shape) != 2 or list(shape) != expected:
        raise ValueError(f"{path}: {name} has shape {shape}, the manifest says {expected}")
    return shape[0], shape[1]


def check_format(path: Path, data: Mapping[str, Any], expected: str) -> None:
    """Accept version 1 of one of our formats, refuse anything else by name."""
    if data.get("format") != expected:
        raise ValueError(f"{path}: format is {data.get('format')!r}, {expected!r} was expected")
    if data.get("version") != 1:
        raise ValueError(f"{path}: version {data.get('version')!r} of {expected} is not known, only 1 is")


def read_adapter(folder: Path) -> StoredAdapter:
    """One of our adapter folders, ``adapter.safetensors`` with ``adapter.json``."""
    source, path = folder / "adapter.json", folder / "adapter.safetensors"
    manifest = _manifest(source, "manifold_cl.adapter", path)
    scaling = manifest.get("scaling")
    if not isinstance(scaling, int | float) or not math.isfinite(scaling):
        raise ValueError(f"{source}: 'scaling' is {scaling!r}, a finite number was expected")
    entries = {}
    with open_tensors(path) as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for layer in sorted(manifest["layers"], key=natural_key):
        left, right, scale = f"{layer}.left", f"{layer}.right", f"{layer}.scale"
        said = manifest["layers"][layer]
        m, r = _check_shape(path, left, stored.get(left), said)
        n, rank = _check_shape(path, right, stored.get(right), said)
        if r != rank:
            raise ValueError(f"{path}: {left} has rank {r}, {right} has rank {rank}")
        entries[layer] = Entry(left, right, (m, n, r), float(scaling), scale if scale in stored else None)
    task = str(manifest.get("task") or folder.name)
    return StoredAdapter(task, str(manifest.get("kind", "unknown")), path, entries)


def read_bases(folder: Path) -> StoredBases | None:
    """The protected subspaces that lie in a task's folder, or None when it has none."""
    source, path = folder / "memory.json", folder / "memory.safetensors"
    if not source.exists() and not path.exists():
        return None
    manifest = _manifest(source, "manifold_cl.memory", path)
    with open_tensors(path) as file:
        names = set(file.keys())
        shapes = {}
        for layer in manifest["layers"]:
            name = f"{layer}.basis"
            shape = tuple(file.get_slice(name).get_shape()) if name in names else None
            shapes[layer] = _check_shape(path, name, shape, manifest["layers"][layer])
    return StoredBases(path, shapes)
