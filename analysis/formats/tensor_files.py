"""Opening files of tensors: safetensors lazily, torch's own files without unpickling anything but tensors."""

import json
import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TORCH_FILES = (".bin", ".pt", ".pth")


class OpenFile(Protocol):
    """What safetensors' ``safe_open`` gives: names, shapes and, on demand, tensors."""

    def keys(self) -> Any:
        """Names of the tensors."""

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, read now."""

    def get_slice(self, name: str) -> Any:
        """One tensor, not read; ``get_shape()`` gives its shape."""


@dataclass(frozen=True)
class _TorchFile:
    """A torch file behind the face of a safetensors file."""

    tensors: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor; torch maps the file, so it is read now."""
        return self.tensors[name]

    def get_slice(self, name: str) -> "_TorchShape":
        """One tensor's shape."""
        return _TorchShape(tuple(self.tensors[name].shape))


@dataclass(frozen=True)
class _TorchShape:
    shape: tuple[int, ...]

    def get_shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.shape


def open_tensors(path: Path) -> AbstractContextManager[Any]:
    """A file of tensors, opened lazily: safetensors, or a torch file that holds nothing but tensors.

    Torch files are read with ``weights_only=True``: any other object in them is refused, never built.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, of another kind, or a pickle of more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix in TORCH_FILES:
        return nullcontext(_TorchFile(_load_torch(path)))
    try:
        opened: AbstractContextManager[Any] = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    return opened


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle of more than tensors, which is refused unread: save as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated, or a pickle of the old kind, which is not read ({str(error).splitlines()[0]}): "
            "save as safetensors"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds a {type(found).__name__}, a mapping from names to tensors was expected")
    return dict(found)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in a file, from its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or of another kind.
    """
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_tensor(file: OpenFile, path: Path, name: str) -> Tensor:
    """One tensor in float32.

    Raises:
        ValueError: it holds NaN or infinite numbers.
    """
    tensor = file.get_tensor(name).float()
    # one pass without a mask: both ends are NaN where anything is
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
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
