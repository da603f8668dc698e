"""Our own folders: adapters and protected subspaces with their manifests (docs/record-format.md)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.formats.files import (
    OpenFile,
    is_file,
    number,
    open_file,
    read_json,
    read_tensor,
    require_file,
    stored_shapes,
)
from analysis.formats.sources import Entry, Shape, StoredAdapter
from analysis.names import natural_key, unwrapped

ORTHONORMALITY = 1e-4
"""Largest entry of |FᵀF − I|: ten times what QR leaves in float32 at n = 10⁴. Half precision exceeds it."""


@dataclass(frozen=True)
class StoredBases:
    """Protected subspaces of one task's end: layer name to orthonormal columns, read when asked.

    `stored` maps a layer's name to the tensor's name in the file.
    """

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    stored: Mapping[str, str]

    @cached_property
    def _opened(self) -> OpenFile:
        """The file, opened once: its header lists all layers, so opening it per layer takes quadratic time."""
        return open_file(self.path)

    def basis(self, layer: str) -> Tensor | None:
        """(n, k) in float32, or None for a layer without a protected subspace.

        Raises:
            ValueError: the basis is not orthonormal, or holds other values than finite floating-point numbers.
        """
        if layer not in self.stored:
            return None
        basis = read_tensor(self._opened, self.path, self.stored[layer])
        wide = basis.double()
        gram = wide.mT @ wide
        off = (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item() if gram.numel() else 0.0
        if not off < ORTHONORMALITY:
            raise ValueError(
                f"{self.path}: {self.stored[layer]} is no orthonormal basis: FᵀF differs from the identity by "
                f"{off:.1e}, up to {ORTHONORMALITY:g} is accepted. Leakage would mean nothing: write the memory again"
            )
        return basis

    def relabelled(self, names: Mapping[str, str]) -> "StoredBases":
        """The same subspaces by other names of layers: name that is shown to the present one."""
        kept = {name: own for name, own in names.items() if own in self.stored}
        return StoredBases(
            self.path,
            {name: self.shapes[own] for name, own in kept.items()},
            {name: self.stored[own] for name, own in kept.items()},
        )


def _manifest(path: Path, expected: str, tensors: Path, *, newest: int = 1) -> dict[str, Any]:
    """The manifest of one of our files, once format, version and checksum agree.

    Where the tensors are not those of the manifest, a write may have been killed between its two renames: the
    manifest is then the file that ends with ``.next.json``, if its checksum is that of the tensors.
    """
    if not is_file(tensors):
        read_json(path)
        raise FileNotFoundError(f"{tensors} does not exist, though {path.name} describes it")
    require_file(tensors)
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    waiting = path.with_suffix(".next.json")
    if is_file(waiting) and (not is_file(path) or read_json(path).get("sha256") != digest):
        path = waiting if not is_file(path) or _checksum(waiting) == digest else path
    manifest = read_json(path)
    check_format(path, manifest, expected, newest=newest)
    if digest != manifest.get("sha256"):
        raise ValueError(
            f"{tensors}: sha256 is {digest}, the manifest says {manifest.get('sha256')}; the file was truncated, "
            "edited or belongs to another manifest"
        )
    if not isinstance(manifest.get("layers"), dict):
        raise ValueError(f"{path}: key 'layers' is missing or not an object")
    return manifest


def _checksum(path: Path) -> Any:
    """The checksum in a manifest; None where the file is damaged."""
    try:
        return read_json(path).get("sha256")
    except ValueError:
        return None


def _check_shape(path: Path, name: str, shape: tuple[int, ...] | None, said: Any) -> tuple[int, int]:
    """The shape of a stored matrix, once the manifest agrees with it."""
    expected = said.get(name.rpartition(".")[2]) if isinstance(said, dict) else said
    if shape is None or len(shape) != 2 or list(shape) != expected:
        raise ValueError(f"{path}: {name} has shape {shape}, the manifest says {expected}")
    return shape[0], shape[1]


def check_format(path: Path, data: Mapping[str, Any], expected: str, *, newest: int = 1) -> None:
    """Accept one of our formats up to version `newest`, refuse anything else by name."""
    if data.get("format") != expected:
        raise ValueError(f"{path}: format is {data.get('format')!r}, {expected!r} was expected")
    if data.get("version") not in range(1, newest + 1):
        known = "only 1 is" if newest == 1 else f"those up to {newest} are"
        raise ValueError(f"{path}: version {data.get('version')!r} of {expected} is not known, {known}")


def own_entry(path: Path, stored: Mapping[str, Any], stem: str, start: str, shape: Shape, scaling: float) -> Entry:
    """The layer whose tensors begin with ``stem``, and its compensated start where one begins with ``start``.

    Raises:
        ValueError: a scale is no number, diagonal or matrix of the rank, or the start has other shapes than the rest.
    """
    m, n, r = shape

    def entry(prefix: str, rank: int, start: Entry | None = None) -> Entry:
        core = f"{prefix}scale"
        if tuple(stored.get(core, ())) not in ((), (1,), (r,), (r, r)):
            raise ValueError(f"{path}: {core} has shape {stored[core]}, expected a number, ({r},) or ({r}, {r})")
        size = (m, n, rank)
        return Entry(f"{prefix}left", f"{prefix}right", size, scaling, core if core in stored else None, start=start)

    beginnings = [stored.get(f"{start}{side}") for side in ("left", "right")]
    if beginnings == [None, None]:
        return entry(stem, r)
    if beginnings != [(m, r), (n, r)]:
        raise ValueError(f"{path}: {start}left and {start}right have shapes {beginnings}, expected {[(m, r), (n, r)]}")
    return entry(stem, 2 * r, entry(start, r))


def read_adapter(folder: Path) -> StoredAdapter:
    """One of our adapter folders, ``adapter.safetensors`` with ``adapter.json``: any core, any start."""
    source, path = folder / "adapter.json", folder / "adapter.safetensors"
    manifest = _manifest(source, "manifold_cl.adapter", path, newest=2)
    scaling = number(source, "scaling", manifest.get("scaling"))
    entries: dict[str, Entry] = {}
    stored = stored_shapes(path)
    for own in sorted(manifest["layers"], key=natural_key):
        said = manifest["layers"][own]
        m, r = _check_shape(path, f"{own}.left", stored.get(f"{own}.left"), said)
        n, rank = _check_shape(path, f"{own}.right", stored.get(f"{own}.right"), said)
        if r != rank:
            raise ValueError(f"{path}: {own}.left has rank {r}, {own}.right has rank {rank}")
        require_sizes(path, own, (m, n, r))
        entry = own_entry(path, stored, f"{own}.", f"{own}.start_", (m, n, r), scaling)
        if entries.setdefault(unwrapped(own), entry) is not entry:
            raise ValueError(f"{path}: {own} is the same layer as another one: {unwrapped(own)}")
    if not entries:
        raise ValueError(f"{source}: key 'layers' is empty: the adapter has no layers")
    read = {name for entry in entries.values() for name in tensors_of(entry)}
    if odd := [name for name in sorted(stored, key=natural_key) if name not in read]:
        raise ValueError(f"{path}: {odd[0]} is not described by {source.name}: another version's file?")
    task, kind = manifest.get("task") or folder.name, manifest.get("kind", "unknown")
    if not isinstance(task, str) or not isinstance(kind, str):
        raise ValueError(f"{source}: 'task' is {task!r} and 'kind' is {kind!r}, text was expected")
    return StoredAdapter(task, kind, path, entries)


def require_sizes(path: Path, layer: str, shape: Shape) -> None:
    """Accept factors with at least one row and one column.

    Raises:
        ValueError: a size is zero.
    """
    if 0 in shape:
        m, n, r = shape
        raise ValueError(f"{path}: {layer} has {m} outputs, {n} inputs and rank {r}: at least 1 of each was expected")


def tensors_of(entry: Entry) -> list[str]:
    """Names of all tensors that a layer is read from."""
    names = [entry.left, entry.right, *([entry.core] if entry.core is not None else [])]
    return names if entry.start is None else [*names, *tensors_of(entry.start)]


def read_bases(folder: Path) -> StoredBases | None:
    """The protected subspaces that lie in a folder, or None when it has none."""
    source, path = folder / "memory.json", folder / "memory.safetensors"
    if not is_file(source) and not is_file(path):
        return None
    manifest = _manifest(source, "manifold_cl.memory", path)
    there = stored_shapes(path)
    shapes: dict[str, tuple[int, int]] = {}
    stored: dict[str, str] = {}
    for own, said in manifest["layers"].items():
        shape = _check_shape(path, f"{own}.basis", there.get(f"{own}.basis"), said)
        if stored.setdefault(unwrapped(own), f"{own}.basis") != f"{own}.basis":
            raise ValueError(f"{path}: {own} is the same layer as another one: {unwrapped(own)}")
        shapes[unwrapped(own)] = shape
    return StoredBases(path, shapes, stored)
