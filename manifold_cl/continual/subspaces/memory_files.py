"""Bases on disk: replaced as a whole or not at all, checked layer by layer, read when asked for.

Two files cannot be renamed at one moment, so the new manifest is written beside the old one first. Killed between
the two renames, the pair is still complete: the new tensors with the manifest that waits for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifold_cl import __version__
from manifold_cl.adapters.files import VERSION, FileError, read_json, write_json
from manifold_cl.geometry import ProtectedSubspace

MEMORY_FORMAT = "manifold_cl.memory"
TENSORS, MANIFEST, WAITING = "memory.safetensors", "memory.json", "memory.next.json"
PIECE = 2**24
"""Bytes that are hashed at once."""


def write(folder: Path, bases: Mapping[str, Tensor], details: Mapping[str, Any]) -> None:
    """Replace the folder's memory by these bases, ``details`` in its manifest.

    Raises:
        OSError: when it cannot be written, naming the file; what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _waits(folder):  # the manifest of an earlier write must not be lost to this one's
        (folder / WAITING).replace(folder / MANIFEST)
    tensors = {f"{name}.basis": basis.detach().cpu().contiguous() for name, basis in bases.items()}
    temporary = folder / f".{TENSORS}.{os.getpid()}.tmp"
    try:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # its way to report what the disk said
            raise OSError(f"{folder / TENSORS} could not be written ({error}): the old memory is untouched") from error
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        manifest = {
            "format": MEMORY_FORMAT,
            "version": VERSION,
            **details,
            "dtype": sorted({str(b.dtype).removeprefix("torch.") for b in bases.values()}),
            "layers": {name: {"basis": list(basis.shape)} for name, basis in bases.items()},
            "digests": {name: _digest(tensors[f"{name}.basis"]) for name in bases},
            "library": __version__,
            "sha256": _file_digest(temporary),
        }
        write_json(folder / WAITING, manifest)
        temporary.replace(folder / TENSORS)
        (folder / WAITING).replace(folder / MANIFEST)
        _sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def read(folder: Path, *, lazy: bool = False) -> tuple[Mapping[str, ProtectedSubspace], dict[str, Any]]:
    """The bases and the manifest that `write` wrote; nothing but the manifest is read yet if ``lazy``.

    Raises:
        FileError: when a file is missing or damaged, or the two do not belong together.
    """
    path = folder / TENSORS
    manifest = read_json(folder / (WAITING if _waits(folder) else MANIFEST), expected=MEMORY_FORMAT)
    if lazy:
        return StoredBases(path, manifest), manifest
    _check_digest(path, manifest)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FileError(f"{path} is no safetensors file ({error})") from None
    if lacking := [f"{name}.basis" for name in manifest["layers"] if f"{name}.basis" not in tensors]:
        raise FileError(f"{folder / MANIFEST} names tensors that {TENSORS} lacks: {', '.join(lacking[:5])}")
    # Copies, where fresh tensors lie: products of memory at odd addresses round differently.
    return {name: ProtectedSubspace(tensors[f"{name}.basis"].clone()) for name in manifest["layers"]}, manifest


def _waits(folder: Path) -> bool:
    """Whether a write was killed between its two renames, so that the waiting manifest is the right one."""
    waiting, tensors = folder / WAITING, folder / TENSORS
    if not (waiting.exists() and tensors.exists()):
        return False
    promised = read_json(waiting, expected=MEMORY_FORMAT).get("sha256")
    return _file_digest(tensors) == promised


def _check_digest(path: Path, manifest: Mapping[str, Any]) -> None:
    digest, promised = _file_digest(path), str(manifest.get("sha256"))
    if digest != promised:
        raise FileError(
            f"{path} does not match its manifest (sha256 {digest[:12]}…, expected {promised[:12]}…): it was changed, "
            "or its write was interrupted"
        )


class StoredBases(Mapping[str, ProtectedSubspace]):
    """Layer → subspace, read from the file when it is asked for, and checked against the manifest then.

    Raises:
        FileError: for a file that is missing or damaged, or a layer that is not what the manifest promises.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path, self._layers = path, manifest["layers"]
        self._digests = manifest.get("digests")
        if self._digests is None:  # a file of an older version vouches for itself as a whole only
            _check_digest(path, manifest)

    def shape(self, name: str) -> tuple[int, int]:
        """(n, k), from the manifest."""
        n, k = self._layers[name]["basis"]
        return n, k

    def __getitem__(self, name: str) -> ProtectedSubspace:
        shape = self.shape(name)
        try:
            with safe_open(self._path, framework="pt") as file:
                basis: Tensor = file.get_tensor(f"{name}.basis").clone()  # a copy: where fresh tensors lie
        except FileNotFoundError:
            raise FileError(f"{self._path} does not exist, though its manifest does") from None
        except SafetensorError as error:
            raise FileError(f"{self._path} has no {name}.basis or is truncated ({error})") from None
        if tuple(basis.shape) != shape or (self._digests is not None and _digest(basis) != self._digests[name]):
            raise FileError(f"{self._path}: {name}.basis is not what its manifest promises: the file was changed")
        return ProtectedSubspace(basis)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"").hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist, though its manifest does") from None
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the renames last through a power cut, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
