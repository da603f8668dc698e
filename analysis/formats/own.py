"""Our own folders: adapters and protected subspaces with their manifests (docs/record-format.md)."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.formats.sources import Entry, Shape, StoredAdapter
from analysis.formats.tensor_files import open_tensors, read_json, read_tensor, stored_shapes
from analysis.names import natural_key


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
            return read_tensor(file, self.path, f"{layer}.basis")


def _manifest(path: Path, expected: str, tensors: Path, *, newest: int = 1) -> dict[str, Any]:
    """The manifest of one of our files, once format, version and checksum agree."""
    manifest = read_json(path)
    check_format(path, manifest, expected, newest=newest)
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


def check_format(path: Path, data: Mapping[str, Any], expected: str, *, newest: int = 1) -> None:
    """Accept one of our formats up to version `newest`, refuse anything else by name."""
    if data.get("format") != expected:
        raise ValueError(f"{path}: format is {data.get('format')!r}, {expected!r} was expected")
    if data.get("version") not in range(1, newest + 1):
        known = "only 1 is" if newest == 1 else f"those up to {newest} are"
        raise ValueError(f"{path}: version {data.get('version')!r} of {expected} is not known, {known}")


def own_entry(stored: Mapping[str, Any], stem: str, start: str, shape: Shape, scaling: float) -> Entry:
    """The layer whose tensors begin with ``stem``, and its compensated start where one begins with ``start``."""

    def entry(prefix: str, rank: int, start: Entry | None = None) -> Entry:
        core = f"{prefix}scale"
        size = (*shape[:2], rank)
        return Entry(f"{prefix}left", f"{prefix}right", size, scaling, core if core in stored else None, start=start)

    if f"{start}left" not in stored:
        return entry(stem, shape[2])
    return entry(stem, 2 * shape[2], entry(start, shape[2]))


def read_adapter(folder: Path) -> StoredAdapter:
    """One of our adapter folders, ``adapter.safetensors`` with ``adapter.json``: any core, any start."""
    source, path = folder / "adapter.json", folder / "adapter.safetensors"
    manifest = _manifest(source, "manifold_cl.adapter", path, newest=2)
    scaling = manifest.get("scaling")
    if not isinstance(scaling, int | float) or not math.isfinite(scaling):
        raise ValueError(f"{source}: 'scaling' is {scaling!r}, a finite number was expected")
    entries = {}
    stored = stored_shapes(path)
    for layer in sorted(manifest["layers"], key=natural_key):
        said = manifest["layers"][layer]
        m, r = _check_shape(path, f"{layer}.left", stored.get(f"{layer}.left"), said)
        n, rank = _check_shape(path, f"{layer}.right", stored.get(f"{layer}.right"), said)
        if r != rank:
            raise ValueError(f"{path}: {layer}.left has rank {r}, {layer}.right has rank {rank}")
        entries[layer] = own_entry(stored, f"{layer}.", f"{layer}.start_", (m, n, r), float(scaling))
    task = str(manifest.get("task") or folder.name)
    return StoredAdapter(task, str(manifest.get("kind", "unknown")), path, entries)


def read_bases(folder: Path) -> StoredBases | None:
    """The protected subspaces that lie in a folder, or None when it has none."""
    source, path = folder / "memory.json", folder / "memory.safetensors"
    if not source.exists() and not path.exists():
        return None
    manifest = _manifest(source, "manifold_cl.memory", path)
    stored = stored_shapes(path)
    shapes = {
        layer: _check_shape(path, f"{layer}.basis", stored.get(f"{layer}.basis"), manifest["layers"][layer])
        for layer in manifest["layers"]
    }
    return StoredBases(path, shapes)
