"""Protected bases on disk: one file ``memory.safetensors`` per folder, read layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from weakref import WeakValueDictionary

from manifold_cl.adapters.base_layers import WIDE
from manifold_cl.files import FileError, file_errors
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.kinds import is_whole
from manifold_cl.tensor_files import TensorFile

MEMORY = "memory.safetensors"
SUFFIX, PACKED = ".basis", ".packed"
"""Endings of tensors: a basis (n, k), or its columns in six bits per entry."""


class MemoryFile(Mapping[str, ProtectedSubspace]):
    """Layer → subspace, read when it is used; FileError for a damaged or missing file, or a basis that is not one.

    Layers that share a basis have one tensor in the file, and get the same object while it is in use.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TensorFile(folder / MEMORY)
        self.path, self.manifest = self._file.path, self._file.manifest
        self.shapes: dict[str, tuple[int, int]] = {}
        packed = [name for name in self._file if name.endswith(PACKED)]
        for name in self._file:
            shape = self._file.shape(name)
            if name.endswith(PACKED):
                continue
            if not name.endswith(SUFFIX) or len(shape) != 2 or not 0 <= shape[1] <= shape[0] or not shape[0]:
                raise FileError(f"{self.path}: {name} has shape {shape}, a basis of n by k with k ≤ n is needed")
            self.shapes[name.removesuffix(SUFFIX)] = (shape[0], shape[1])
        with file_errors(self.path):
            rows = self.manifest.get("rows", {})
            self._rows = {name.removesuffix(PACKED): rows[name.removesuffix(PACKED)] for name in packed}
            if odd := [name for name, n in self._rows.items() if not is_whole(n)]:
                raise TypeError(f"the number of rows of {odd[0]} is {self._rows[odd[0]]!r}")
            self.shapes |= {name: (n, self._file.shape(f"{name}{PACKED}")[0]) for name, n in self._rows.items()}
            self.shared = shared_layers(self.manifest.get("shared", {}), self.shapes)
        if self.shared or packed:
            self.shapes |= {name: self.shapes[owner] for name, owner in self.shared.items()}
            self.shapes = dict(sorted(self.shapes.items()))  # as in a file in which every layer has its own
        self._read: WeakValueDictionary[str, ProtectedSubspace] = WeakValueDictionary()

    def __getitem__(self, name: str) -> ProtectedSubspace:
        name = self.shared.get(name, name)
        if (subspace := self._read.get(name)) is None:
            subspace = self._read[name] = self._subspace(name)
        return subspace

    def _subspace(self, name: str) -> ProtectedSubspace:
        if name in self._rows:
            with file_errors(self.path):
                return ProtectedSubspace.from_packed(self._file[f"{name}{PACKED}"], self._rows[name])
        basis = self._file[f"{name}{SUFFIX}"]
        if basis.dtype not in WIDE:
            raise FileError(f"{self.path}: {name}{SUFFIX} is {basis.dtype}, float32 or wider is needed")
        with file_errors(self.path):
            return ProtectedSubspace(basis)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def require_memory(folder: Path) -> None:
    """Raise FileError, with the folder to give instead if one is near, where there is no ``memory.safetensors``."""
    if (folder / MEMORY).exists():
        return
    below = sorted(each.parent for pattern in ("*", "*/*") for each in folder.glob(f"{pattern}/{MEMORY}"))
    advice = "give the folder that SubspaceMemory.save or 'manifold-cl subspace build' wrote"
    if not folder.exists():
        kind = f"{folder / MEMORY} does not exist"
    elif folder.name == MEMORY:
        kind, advice = f"{folder} is a file", f"give its folder, {folder.parent}"
    elif not folder.is_dir():
        kind = f"{folder} is a file, and protected subspaces are a folder with {MEMORY}"
    else:
        kinds = {"record.json": "a run", "adapter.safetensors": "an adapter", "adapter_config.json": "an adapter"}
        held = next((f"{folder} holds {what} and " for name, what in kinds.items() if (folder / name).exists()), "")
        kind = f"{held}{folder / MEMORY} does not exist"
        if below:
            advice = f"give a folder that has one, such as {below[-1]}"
    raise FileError(f"{kind}: {advice}")


def shared_layers(given: object, stored: Mapping[str, object]) -> dict[str, str]:
    """Layer → the layer whose tensor it shares; TypeError or ValueError unless ``given`` is of that form."""
    if not isinstance(given, dict) or not all(isinstance(owner, str) for owner in given.values()):
        raise TypeError(f"shared is a table from layer to layer, got {given!r}")
    if unfit := [name for name, owner in given.items() if owner not in stored or name in stored]:
        raise ValueError(f"{unfit[0]} shares the basis of {given[unfit[0]]}: one of the two must be in the file")
    return dict(given)
