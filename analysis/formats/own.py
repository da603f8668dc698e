"""Our own artefacts: adapters and protected subspaces (docs/record-format.md, "Tensor files")."""

import hashlib
import json
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
    is_whole,
    number,
    open_file,
    parse_json,
    read_json,
    stored_shapes,
)
from analysis.formats.packed_bases import PACKED, unpacked
from analysis.formats.sources import LayerTensors, StoredAdapter, shapes_of
from analysis.names import natural_key, unwrapped

ADAPTER, MEMORY = "adapter.safetensors", "memory.safetensors"
NEWEST = 2
"""Version of tensor files up to which they are read. Version 1 has its manifest in a second file, ``.json``."""
ORTHONORMALITY = 1e-4
"""Largest entry of |FᵀF − I|: ten times what QR leaves in float32 at n = 10⁴. Half precision exceeds it."""
_PARTS = {part: part for part in ("left", "right", "start_left", "start_right")}
_PARTS |= {"core": "scale", "start_core": "start_scale"}
"""Part of a layer's update to the last component of its tensor's name."""


@dataclass(frozen=True)
class ProtectedBases:
    """Protected subspaces of one task's end: layer name to orthonormal columns, read on demand."""

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    stored: Mapping[str, str]
    """Layer name to the tensor's name in the file."""

    @cached_property
    def _opened(self) -> TensorFile:
        """The file, opened once: its header lists all layers, so opening it per layer takes quadratic time."""
        return open_file(self.path)

    def basis(self, layer: str) -> Tensor | None:
        """(n, k) in float32, or None for a layer without a protected subspace; ValueError if not orthonormal."""
        if layer not in self.stored:
            return None
        stored = self.stored[layer]
        packed = stored.endswith(PACKED)
        basis = unpacked(self._opened.stored(stored), self.shapes[layer][0]) if packed else self._opened.read(stored)
        wide = basis.double()
        gram = wide.mT @ wide
        off = (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item() if gram.numel() else 0.0
        if not off < ORTHONORMALITY:
            problem = f"FᵀF differs from the identity by {off:.1e}, up to {ORTHONORMALITY:g} is accepted"
            name = f"{self.path}: {self.stored[layer]}"
            raise ValueError(f"{name} is no orthonormal basis: {problem}. Write the memory again")
        return basis

    def relabelled(self, names: Mapping[str, str]) -> "ProtectedBases":
        """The same subspaces by other names of layers: name that is shown to the present one."""
        kept = {name: own for name, own in names.items() if own in self.stored}
        shapes = {name: self.shapes[own] for name, own in kept.items()}
        return ProtectedBases(self.path, shapes, {name: self.stored[own] for name, own in kept.items()})


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The manifest of one of our tensor files and its shapes; refuses other formats, versions and checksums."""
    shapes = stored_shapes(path)
    kind, source = f"manifold_cl.{path.stem}", path.with_suffix(".json")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        if "manifest" not in metadata:
            if not is_file(source):
                raise FileNotFoundError(f"{path} has no manifest, in its header or in {source.name}")
            manifest = read_json(source)
            check_format(source, manifest, kind, newest=NEWEST)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.get("sha256"):
                raise ValueError(f"{path} was changed or damaged: it does not match the checksum in {source.name}")
            return manifest, shapes
        manifest = parse_json(path, metadata["manifest"])
        check_format(path, manifest, kind, newest=NEWEST)
        before, checksum, after = header.rpartition(str(metadata.get("sha256")).encode())
        if hashlib.sha256(before + b"0" * len(checksum) + after).hexdigest().encode() != checksum:
            raise ValueError(f"{path} was changed or damaged: its header does not match its checksum")
        digests = manifest.get("digests")
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            file.seek(8 + size + start)
            digest = hashlib.sha256(file.read(end - start)).hexdigest()
            if not isinstance(digests, dict) or digests.get(name) != digest:
                raise ValueError(f"{path} was changed or damaged: {name} does not match its checksum")
    return manifest, shapes


def read_format(path: str | Path, name: str, expected: str) -> tuple[Path, dict[str, Any]]:
    """The file `name` in a folder, or the file itself, and its JSON object, whose format is `expected`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, changed, or of another format or version.
    """
    file = Path(path)
    file = file / name if file.is_dir() else file
    data = read_json(file)
    check_format(file, data, expected)
    if "checksum" in data:
        checksum = data.pop("checksum")
        text = json.dumps(data, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != checksum:
            raise ValueError(
                f"{file} was changed or damaged, it does not match its 'checksum': restore it; after a change by hand, "
                "delete that entry"
            )
    return file, data


def check_format(path: Path, data: Mapping[str, Any], expected: str, *, newest: int = 1) -> None:
    """Accept one of our formats up to version `newest`, refuse anything else by name."""
    if data.get("format") != expected:
        raise ValueError(f"{path}: format is {data.get('format')!r}, {expected!r} was expected")
    found = data.get("version")
    if not is_whole(found) or not 1 <= found <= newest:
        readable = "version 1" if newest == 1 else f"versions 1 to {newest}"
        raise ValueError(f"{path}: version {found!r} of {expected} is unknown, {readable} can be read: update analysis")


def read_adapter(folder: Path) -> StoredAdapter:
    """The adapter in one of our folders, with any core and any start."""
    path = folder / ADAPTER
    manifest, stored = read_header(path)
    alpha = number(path, "alpha", manifest.get("alpha"))
    layers: dict[str, LayerTensors] = {}
    for own in sorted({name.rpartition(".")[0] for name in stored}, key=natural_key):
        names = {part: f"{own}.{name}" for part, name in _PARTS.items() if f"{own}.{name}" in stored}
        tensors = LayerTensors.find(path, stored, names, alpha=alpha)
        if layers.setdefault(unwrapped(own), tensors) is not tensors:
            raise ValueError(f"{path}: {own} and another layer are the same layer: {unwrapped(own)}")
    if not layers:
        raise ValueError(f"{path}: the adapter has no layers")
    read = {name for tensors in layers.values() for name in tensors.names}
    if odd := [name for name in sorted(stored, key=natural_key) if name not in read]:
        raise ValueError(f"{path}: {odd[0]} is no part of an update (left, right, scale)")
    task, kind = manifest.get("task") or folder.name, manifest.get("kind", "unknown")
    if not isinstance(task, str) or not isinstance(kind, str):
        raise ValueError(f"{path}: 'task' is {task!r} and 'kind' is {kind!r}, text was expected")
    return StoredAdapter(task=task, kind=kind, shapes=shapes_of(layers), path=path, layers=layers)


def read_bases(folder: Path) -> ProtectedBases | None:
    """The protected subspaces in a folder, or None when it has none."""
    path = folder / MEMORY
    if not is_file(path) and not is_file(path.with_suffix(".json")):
        return None
    manifest, stored = read_header(path)
    rows = dict(manifest.get("rows") or {})
    for name in [name for name in stored if name.endswith(PACKED)]:
        own = name.removesuffix(PACKED)
        if not is_whole(rows.get(own)):
            raise ValueError(f"{path}: the manifest has no number of rows for {name}")
        stored[name] = (rows[own], stored[name][0])
    names = [name for name in stored if name.endswith((".basis", PACKED))]
    layers: dict[str, str] = {}
    for name in names:
        own = unwrapped(name.removesuffix(".basis").removesuffix(PACKED))
        if layers.setdefault(own, name) != name:
            raise ValueError(f"{path}: {name} is of the same layer as another one: {own}")
        if len(stored[name]) != 2:
            raise ValueError(f"{path}: {name} has shape {stored[name]}, a matrix was expected")
    for own, owner in dict(manifest.get("shared") or {}).items():  # layers that receive the same input
        if unwrapped(owner) not in layers:
            raise ValueError(f"{path}: {own} shares the basis of {owner}, which is not in the file")
        layers[unwrapped(own)] = layers[unwrapped(owner)]
    shapes = {own: (stored[name][0], stored[name][1]) for own, name in layers.items()}
    return ProtectedBases(path, shapes, layers)
