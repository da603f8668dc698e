"""Protected bases on disk: one file ``memory.safetensors`` per folder, read layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from manifold_cl.adapters.base_layers import WIDE
from manifold_cl.files import FileError, TensorFile, file_errors
from manifold_cl.geometry import ProtectedSubspace

MEMORY = "memory.safetensors"
SUFFIX = ".basis"


class MemoryFile(Mapping[str, ProtectedSubspace]):
    """Layer → subspace, read when it is used; FileError for a damaged or missing file, or a basis that is not one."""

    def __init__(self, folder: Path) -> None:
        self._file = TensorFile(folder / MEMORY)
        self.path, self.manifest = self._file.path, self._file.manifest
        self.shapes: dict[str, tuple[int, int]] = {}
        for name in self._file:
            shape = self._file.shape(name)
            if not name.endswith(SUFFIX) or len(shape) != 2 or not 0 <= shape[1] <= shape[0] or not shape[0]:
                raise FileError(f"{self.path}: {name} has shape {shape}, a basis of n by k with k ≤ n is needed")
            self.shapes[name.removesuffix(SUFFIX)] = (shape[0], shape[1])

    def __getitem__(self, name: str) -> ProtectedSubspace:
        basis = self._file[f"{name}{SUFFIX}"]
        if basis.dtype not in WIDE:
            raise FileError(f"{self.path}: {name}{SUFFIX} is {basis.dtype}, float32 or wider is needed")
        with file_errors(self.path):
            return ProtectedSubspace(basis)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
