"""Files of others, opened with care: what lies at a path, JSON objects, and tensors without unpickling."""

import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TORCH_FILES = (".bin", ".pt", ".pth")
INDEX = ".index.json"
"""Ending of a file that names the shards of a model, as transformers and diffusers write it."""
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
"""Types whose entries are numbers; whether a scale belongs to them is for the reader of a checkpoint to know."""
POINTER = "version https://git-lfs"
"""Start of the file that stands in for one that Git LFS has not downloaded."""


def is_file(path: Path) -> bool:
    """Whether a file lies at `path`; a name that the file system cannot hold is no file.

    Raises:
        ValueError: something else lies there: a folder, a pipe, a device, or a link that leads nowhere.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character
        if _is_link(path):
            raise ValueError(f"{path} is a link that leads nowhere or to itself") from error
        return False
    if stat.S_ISREG(mode):
        return True
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    raise ValueError(f"{path} is {kind}, a file was expected")


def is_folder(path: Path) -> bool:
    """Whether a folder lies at `path`; a name that the file system cannot hold is no folder."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def require_file(path: Path) -> None:
    """Accept a file that can be read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pointer of Git LFS, or no regular file.
    """
    if not is_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER.encode():
        raise ValueError(f"{path} is a pointer of Git LFS, its contents were not downloaded: run git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, not JSON, not an object, nested too deep, has a key twice, or holds text that
            is not Unicode.
    """
    require_file(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not an object")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} holds an unpaired surrogate, so text that no file can hold: {error}") from None
    return data


def number(source: Path, key: str, value: Any) -> float:
    """A finite number of a JSON file that fits a float.

    Raises:
        ValueError: it is none.
    """
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # JSON's whole numbers have no bound
        pass
    raise ValueError(f"{source}: {key!r} is {value!r:.80}, a finite number was expected")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return data


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


@dataclass(frozen=True)
class _Shards:
    """Several opened files as one."""

    files: Mapping[str, OpenFile]

    def keys(self) -> list[str]:
        """Names of the tensors of all shards."""
        return list(self.files)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, from the shard that holds it."""
        return self.files[name].get_tensor(name)

    def get_slice(self, name: str) -> Any:
        """One tensor, not read, from the shard that holds it."""
        return self.files[name].get_slice(name)


def open_file(path: Path) -> OpenFile:
    """A file of tensors, opened lazily: safetensors, a torch file of nothing but tensors, or an index of shards.

    Safetensors are mapped, not held open. Torch files are read with ``weights_only=True``: any other object in them is
    refused, never built.

    Raises:
        FileNotFoundError: there is no such file, or a shard that the index names is missing.
        ValueError: a file is truncated, of another kind, or a pickle of more than tensors, or an index contradicts
            its shards.
    """
    require_file(path)
    if path.name.endswith(INDEX):
        return _open_shards(path)
    if path.suffix in TORCH_FILES:
        return _TorchFile(_load_torch(path))
    try:
        opened: OpenFile = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    return opened


def shards_of(index: Path) -> dict[str, Path]:
    """Name of each tensor to the file that holds it, as the index says. Files lie beside the index.

    Raises:
        ValueError: the map is missing or damaged, or leads out of the index's folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: key 'weight_map' is missing or not an object")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and Path(shard).name == shard and shard not in ("", "..")
        if not plain or "\\" in shard or shard.endswith(INDEX):
            raise ValueError(
                f"{index}: {name} is said to be in {shard!r}: the name of a file beside the index was expected"
            )
    return {name: index.parent / shard for name, shard in weight_map.items()}


def _open_shards(index: Path) -> _Shards:
    expected = shards_of(index)
    files: dict[str, OpenFile] = {}
    holders: dict[str, Path] = {}
    for shard in sorted(set(expected.values())):
        try:
            opened = open_file(shard)
        except FileNotFoundError:
            raise FileNotFoundError(f"{shard} does not exist, though {index.name} names it") from None
        for name in opened.keys():  # noqa: SIM118
            if name in holders:
                raise ValueError(f"{name} is in {holders[name]} and in {shard.name}: which one is meant is unknown")
            files[name], holders[name] = opened, shard
    for name, shard in expected.items():
        if holders.get(name) != shard:
            raise ValueError(f"{shard} lacks {name}, though {index.name} names it")
    return _Shards(files)


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything, and of those few are declared
        if type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"{path} is a pickle of more than tensors, which is refused unread: save as safetensors"
            ) from error
        raise ValueError(
            f"{path} is truncated, or a pickle of the old kind, which is not read "
            f"({str(error).partition(chr(10))[0] or type(error).__name__}): save as safetensors"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds a {type(found).__name__}, a mapping from names to tensors was expected")
    if odd := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"{path}: {odd[0]!r} is no name of a tensor, text was expected")
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"{path}: {name} is stored as {tensor.layout} on {tensor.device}, a dense tensor was expected"
            )
    return dict(found)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in a file, from its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or of another kind.
    """
    file = open_file(path)
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def stored_tensor(file: OpenFile, path: Path, name: str) -> Tensor:
    """One tensor as it is stored.

    Raises:
        ValueError: it is missing, or of a type that torch does not have.
    """
    try:
        return file.get_tensor(name)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: {name} cannot be read: {error}") from error


def read_tensor(file: OpenFile, path: Path, name: str) -> Tensor:
    """One tensor in float32.

    Raises:
        ValueError: it holds NaN or infinite numbers, or is of a type whose entries are no numbers of a weight.
    """
    return finite_floats(stored_tensor(file, path, name), path, name)


def finite_floats(tensor: Tensor, path: Path, name: str) -> Tensor:
    """The tensor in float32, once its type is one of real numbers and all of them are finite.

    Raises:
        ValueError: it holds NaN or infinite numbers, or integers, booleans or complex numbers.
    """
    if tensor.dtype not in (*NUMBERS, *FLOAT8):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{path}: {name} is stored as {kind}: codes of a quantised tensor, or no weights at all. "
            "Floating-point numbers are needed: save it dequantised"
        )
    tensor = tensor.float()
    # one pass without a mask: both ends are NaN where anything is
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise ValueError(f"{path}: {name} contains NaN or infinite numbers; the run has diverged")
    return tensor
