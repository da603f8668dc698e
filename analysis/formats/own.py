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
    TensorFile,
    is_file,
    number,
    open_file,
    read_json,
    require_file,
    stored_shapes,
)
from analysis.formats.sources import LayerTensors, StoredAdapter, shapes_of
from analysis.names import natural_key, unwrapped

ORTHONORMALITY = 1e-4
"""Largest entry of |FᵀF − I|: ten times what QR leaves in float32 at n = 10⁴. Half precision exceeds it."""
_PARTS = {
    **{part: part for part in ("left", "right", "start_left", "start_right")},
    "core": "scale",
    "start_core": "start_scale",
}
"""Part of a layer's update to the last component of its tensor's name."""


@dataclass(frozen=True)
class ProtectedBases:
    """Protected subspaces of one task's end: layer name to orthonormal columns, read when asked.

    `stored` maps a layer's name to the tensor's name in the file.
    """

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    stored: Mapping[str, str]

    @cached_property
    def _opened(self) -> TensorFile:
        """The file, opened once: its header lists all layers, so opening it per layer takes quadratic time."""
        return open_file(self.path)

    def basis(self, layer: str) -> Tensor | None:
        """(n, k) in float32, or None for a layer without a protected subspace.

        Raises:
            ValueError: the basis is not orthonormal, or holds other values than finite floating-point numbers.
        """
        if layer not in self.stored:
            return None
        basis = self._opened.read(self.stored[layer])
        wide = basis.double()
        gram = wide.mT @ wide
        off = (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item() if gram.numel() else 0.0
        if not off < ORTHONORMALITY:
            raise ValueError(
                f"{self.path}: {self.stored[layer]} is no orthonormal basis: FᵀF differs from the identity by "
                f"{off:.1e}, up to {ORTHONORMALITY:g} is accepted. Leakage would mean nothing: write the memory again"
            )
        return basis

    def relabelled(self, names: Mapping[str, str]) -> "ProtectedBases":
        """The same subspaces by other names of layers: name that is shown to the present one."""
        kept = {name: own for name, own in names.items() if own in self.stored}
        return ProtectedBases(
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


def read_adapter(folder: Path) -> StoredAdapter:
    """One of our adapter folders, ``adapter.safetensors`` with ``adapter.json``: any core, any start."""
    source, path = folder / "adapter.json", folder / "adapter.safetensors"
    manifest = _manifest(source, "manifold_cl.adapter", path, newest=2)
    scaling = number(source, "scaling", manifest.get("scaling"))
    layers: dict[str, LayerTensors] = {}
    stored = stored_shapes(path)
    for own in sorted(manifest["layers"], key=natural_key):
        for part in ("left", "right"):
            _check_shape(path, f"{own}.{part}", stored.get(f"{own}.{part}"), manifest["layers"][own])
        names = {part: f"{own}.{name}" for part, name in _PARTS.items() if f"{own}.{name}" in stored}
        tensors = LayerTensors.find(path, stored, names, scaling=scaling)
        if layers.setdefault(unwrapped(own), tensors) is not tensors:
            raise ValueError(f"{path}: {own} and another layer are the same layer: {unwrapped(own)}")
    if not layers:
        raise ValueError(f"{source}: key 'layers' is empty: the adapter has no layers")
    read = {name for tensors in layers.values() for name in tensors.names}
    if odd := [name for name in sorted(stored, key=natural_key) if name not in read]:
        raise ValueError(f"{path}: {odd[0]} is not described by {source.name}: another version's file?")
    task, kind = manifest.get("task") or folder.name, manifest.get("kind", "unknown")
    if not isinstance(task, str) or not isinstance(kind, str):
        raise ValueError(f"{source}: 'task' is {task!r} and 'kind' is {kind!r}, text was expected")
    return StoredAdapter(task=task, kind=kind, shapes=shapes_of(layers), path=path, layers=layers)


def read_bases(folder: Path) -> ProtectedBases | None:
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
    return ProtectedBases(path, shapes, stored)
