"""Tensor files: one safetensors file with a JSON manifest in its header (docs/record-format.md, "Tensor files")."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from manifold_cl._version import __version__
from manifold_cl.files import RESTORE, FileError, file_errors, parse_json, read_json, replacing, require_file
from manifold_cl.kinds import is_whole
from manifold_cl.linalg import is_finite

TENSORS_VERSION = 2
"""The version of tensor files. Version 1 had its manifest in a second file, whose name ends with ``.json``."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
"""Names in safetensors of the precisions that tensor files may have."""
NO_CHECKSUM = b"0" * 64
"""Stands for the header's checksum while that is computed."""
MAX_HEADER = 100_000_000
"""Bytes of the largest header that the safetensors library reads."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Replace ``path`` by one safetensors file with ``manifest`` and checksums in its header, or leave it untouched.

    ``path`` ends with ``.safetensors``; the name before that is the ``format`` in the manifest. Tensors that share
    memory are written one by one. Errors as `save_tensors` and `replacing`.
    """
    content = {
        "format": _format_of(path),
        "version": TENSORS_VERSION,
        **manifest,
        "library": __version__,
        "digests": {name: hashlib.sha256(_content(tensor)).hexdigest() for name, tensor in tensors.items()},
    }
    with replacing(path) as file:
        text = json.dumps(content, allow_nan=False)
        save_tensors(file, tensors, {"manifest": text, "sha256": NO_CHECKSUM.decode()})
    path.with_suffix(".json").unlink(missing_ok=True)  # version 1: its manifest, and folders of its killed writes
    for stage in path.parent.glob(f".{path.name}.*.staged"):
        shutil.rmtree(stage, ignore_errors=True)


def save_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. One tensor at a time is copied from its device.

    `NO_CHECKSUM` in the last entry of the header's ``metadata``, ``sha256``, is replaced by the header's checksum.
    TypeError for a tensor that is not floating point of 16 bits or more, or uint8.
    """
    # Wide numbers first: readers that map the file need every tensor at a multiple of its entries' size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered.items():
        if tensor.dtype not in names:
            raise TypeError(f"{name} is {tensor.dtype}, floating point of 16 bits or more, or uint8, is needed")
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps({**entries, "__metadata__": dict(metadata)}).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise ValueError(f"the header of {file.name} has {len(header)} bytes, at most {MAX_HEADER} can be read again")
    if "sha256" in metadata:
        before, _, after = header.rpartition(NO_CHECKSUM)
        header = before + hashlib.sha256(header).hexdigest().encode() + after
    file.write(len(header).to_bytes(8, "little") + header)
    for tensor in ordered.values():
        file.write(_content(tensor))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest of a file of `write_tensors`; FileError as `TensorFile`."""
    file = TensorFile(path)
    return dict(file), file.manifest


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file, with or without a manifest; FileError as `TensorFile`."""
    return dict(TensorFile(path, foreign=True))


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read, verified and copied one at a time.

    The reader of safetensors maps the file into memory, and a file that is truncated later ends the process.
    A ``foreign`` file needs no manifest and no checksums.

    Raises:
        FileError: when it is missing, damaged, or of another format or version; also while a tensor is read, when the
            tensor is damaged, not floating point, or not finite.
    """

    def __init__(self, path: Path, *, foreign: bool = False) -> None:
        require_file(path)
        self.path = path
        self.manifest: dict[str, Any] = {}
        self.checksum = ""
        """Checksum of the header, which lists those of all tensors; empty for foreign files and version 1."""
        self._digests: dict[str, str] = {}
        with file_errors(path), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            total = path.stat().st_size
            if size > min(total - 8, MAX_HEADER):
                raise FileError(f"{path} is truncated, or not a safetensors file: {RESTORE}")
            header = file.read(size)
            content = json.loads(header)
            metadata = content.pop("__metadata__", {})
            self._start = 8 + size
            self._entries = {name: _entry(name, entry) for name, entry in content.items()}
            end = self._start + max((end for *_, end in self._entries.values()), default=0)
            if end != total:
                raise FileError(f"{path} has {total} bytes instead of the {end} that its header announces: {RESTORE}")
            if not foreign and "manifest" in metadata:
                self.manifest = parse_json(path, metadata["manifest"], _format_of(path), version=TENSORS_VERSION)
                self.checksum = metadata["sha256"]
                before, checksum, after = header.rpartition(self.checksum.encode())
                if hashlib.sha256(before + NO_CHECKSUM + after).hexdigest().encode() != checksum:
                    raise FileError(f"{path} was changed or damaged, its header does not match its checksum: {RESTORE}")
                self._digests = dict(self.manifest["digests"])
                if self._digests.keys() != self._entries.keys():
                    raise FileError(f"{path} has checksums of other tensors than it holds: {RESTORE}")
        if not foreign and not self.manifest:
            self.manifest = _version_1_manifest(path)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._entries[name][1]

    def verify(self) -> None:
        """Read every tensor, one at a time; FileError for the first that is damaged."""
        for name in self:
            self[name]

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, start, end = self._entries[name]
        if dtype not in DTYPES:
            raise FileError(f"{self.path}: {name} is {dtype}, floating point of 16 bits or more, or uint8, is needed")
        # Fresh memory: equal bits of products need equal alignment, which the file's own offsets do not have.
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        content = _content(tensor)
        with file_errors(self.path), self.path.open("rb") as file:
            file.seek(self._start + start)
            if file.readinto(content) != end - start:
                raise FileError(f"{self.path} is truncated: {name} ends beyond it")
        if self._digests and hashlib.sha256(content).hexdigest() != self._digests.get(name):
            raise FileError(f"{self.path} was changed or damaged, {name} does not match its checksum: {RESTORE}")
        if not is_finite(tensor):
            raise FileError(f"{self.path}: {name} has NaN or infinite entries: the run that wrote it had diverged")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _format_of(path: Path) -> str:
    return f"manifold_cl.{path.stem}"


def _entry(name: str, entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """The precision, shape, first and last byte of a tensor, from its entry in a header."""
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(is_whole(number) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name} has shape {shape} and offsets {start} and {end}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError(f"{name} of shape {shape} in {dtype} has {end - start} bytes")
    return dtype, shape, start, end


def _content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row; shared with it if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _version_1_manifest(path: Path) -> dict[str, Any]:
    """The manifest beside a tensor file of version 1, once its checksum is that of the file."""
    described = path.with_suffix(".json")
    if not described.exists():
        raise FileError(f"{path} has no manifest, in its header or in {described.name}: {RESTORE}")
    manifest = read_json(described, expected=_format_of(path), version=TENSORS_VERSION)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != manifest.get("sha256"):
        raise FileError(f"{path} was changed or damaged, it does not match the checksum in {described.name}: {RESTORE}")
    return manifest
