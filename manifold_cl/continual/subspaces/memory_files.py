"""Bases on disk: replaced as a whole or not at all, checked layer by layer, read when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_cl.adapters.base_layers import WIDE
from manifold_cl.files import (
    VERSION,
    FileError,
    check_digest,
    file_digest,
    interpreted,
    load_tensors,
    promised_digest,
    read_json,
    require_file,
    require_finite,
    write_tensors,
)
from manifold_cl.geometry import ProtectedSubspace

MEMORY_FORMAT = "manifold_cl.memory"
TENSORS, MANIFEST, WAITING = "memory.safetensors", "memory.json", "memory.next.json"
DTYPES = {"F32": torch.float32, "F64": torch.float64}
"""What safetensors calls the precisions of bases."""


def write(folder: Path, bases: Mapping[str, Tensor], details: Mapping[str, Any]) -> None:
    """Replace the folder's memory by these bases, ``details`` in its manifest.

    Raises:
        OSError: when it cannot be written, naming the file; what was there before is untouched.
    """
    if _waits(folder):  # written by an older version that was killed: tensors and manifest become a pair again
        (folder / WAITING).replace(folder / MANIFEST)
    manifest = {
        "format": MEMORY_FORMAT,
        "version": VERSION,
        **details,
        "dtype": sorted({str(b.dtype).removeprefix("torch.") for b in bases.values()}),
        "layers": {name: {"basis": list(basis.shape)} for name, basis in bases.items()},
        "digests": {name: _digest(basis) for name, basis in bases.items()},
    }
    write_tensors(folder / "memory", {f"{name}.basis": basis for name, basis in bases.items()}, manifest)
    (folder / WAITING).unlink(missing_ok=True)


def read(folder: Path, *, lazy: bool = False) -> tuple[Mapping[str, ProtectedSubspace], dict[str, Any]]:
    """The bases and the manifest that `write` wrote; nothing but the manifest is read yet if ``lazy``.

    Raises:
        FileError: when a file is missing or damaged, or the two do not belong together.
    """
    path, described = folder / TENSORS, folder / (WAITING if _waits(folder) else MANIFEST)
    manifest = read_json(described, expected=MEMORY_FORMAT)
    _check_layers(described, manifest)
    if lazy:
        return StoredBases(path, manifest), manifest
    check_digest(path, manifest)
    tensors = load_tensors(path)
    expected = [f"{name}.basis" for name in manifest["layers"]]
    if lacking := [name for name in expected if name not in tensors]:
        raise FileError(f"{described} names tensors that {TENSORS} lacks: {', '.join(lacking[:5])}")
    if more := sorted(tensors.keys() - set(expected)):
        raise FileError(f"{path} has tensors that {described.name} lacks: {', '.join(more[:5])}")
    shapes = {name: tuple(sizes["basis"]) for name, sizes in manifest["layers"].items()}
    return {name: _subspace(path, name, tensors[f"{name}.basis"], shape) for name, shape in shapes.items()}, manifest


def _check_layers(described: Path, manifest: Mapping[str, Any]) -> None:
    with interpreted(described):
        for name, sizes in manifest["layers"].items():
            n, k = sizes["basis"]
            if type(n) is not int or type(k) is not int or not 0 <= k <= n or n < 1:
                raise FileError(f"{described}: {name} has a basis of {n!r} by {k!r}, whole numbers k ≤ n are needed")
        if (digests := manifest.get("digests")) is not None and digests.keys() != manifest["layers"].keys():
            raise FileError(f"{described}: layers and digests are of different layers")


def _subspace(path: Path, name: str, basis: Tensor, shape: tuple[int, ...]) -> ProtectedSubspace:
    if tuple(basis.shape) != shape or basis.dtype not in WIDE:
        raise FileError(
            f"{path}: {name}.basis is not what its manifest promises: {tuple(basis.shape)} in {basis.dtype}, expected "
            f"{shape} in float32 or wider"
        )
    require_finite(path, f"{name}.basis", basis)
    with interpreted(path):
        return ProtectedSubspace(basis)


def _waits(folder: Path) -> bool:
    """Whether a write of an older version was killed between its two renames: the waiting manifest is then right."""
    waiting, tensors = folder / WAITING, folder / TENSORS
    if not (waiting.is_file() and tensors.is_file()):
        return False
    return file_digest(tensors) == promised_digest(waiting)  # None where that write was killed halfway


class StoredBases(Mapping[str, ProtectedSubspace]):
    """Layer → subspace, read from the file when it is asked for, and checked against the manifest then.

    The file's header is read once, so that all layers together cost time in proportion to their number.

    Raises:
        FileError: for a file that is missing or damaged, or a layer that is not what the manifest promises.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path, self._layers = path, manifest["layers"]
        self._digests = manifest.get("digests")
        self._places: dict[str, tuple[str, int, int]] | None = None
        if self._digests is None:  # a file of an older version has one checksum for all its layers
            check_digest(path, manifest)

    def shape(self, name: str) -> tuple[int, int]:
        """(n, k), from the manifest."""
        n, k = self._layers[name]["basis"]
        return n, k

    def __getitem__(self, name: str) -> ProtectedSubspace:
        n, k = self.shape(name)
        require_file(self._path, "does not exist, though its manifest does")
        if self._places is None:
            self._places = _places(self._path)
        if f"{name}.basis" not in self._places:
            raise FileError(f"{self._path} has no {name}.basis")
        kind, start, end = self._places[f"{name}.basis"]
        if (dtype := DTYPES.get(kind)) is None:
            raise FileError(f"{self._path}: {name}.basis is {kind}, float32 or wider is needed")
        with self._path.open("rb") as file:
            file.seek(start)
            content = bytearray(file.read(end - start))
        if len(content) != n * k * dtype.itemsize:
            raise FileError(f"{self._path} has no {name}.basis of {n} by {k} or is truncated")
        if self._digests is not None and hashlib.sha256(content).hexdigest() != self._digests[name]:
            raise FileError(f"{self._path}: {name}.basis is not what its manifest promises: the file was changed")
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return _subspace(self._path, name, flat.clone().view(n, k), (n, k))  # a copy: where fresh tensors lie

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _places(path: Path) -> dict[str, tuple[str, int, int]]:
    """Tensor name → precision, first and last byte in a safetensors file, from its header.

    The library's own reader maps the file into memory, where a file that is cut short later ends the process.
    """
    with interpreted(path), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise FileError(f"{path} is no safetensors file or is truncated")
        header = json.loads(file.read(size))
        return {
            name: (entry["dtype"], *(8 + size + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"").hexdigest()
