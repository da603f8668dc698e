"""Files of others, opened with care: kinds of files, JSON objects, and tensors without unpickling."""

import json
import math
import pickle
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TORCH_FILES = (".bin", ".pt", ".pth")
INDEX = ".index.json"
"""Ending of a file that names the shards of a model, as transformers and diffusers write it."""
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
KINDS_OF_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
FLOAT8: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in KINDS_OF_FLOAT8 if hasattr(torch, name))
"""Types whose entries are numbers, those that this torch has: torch 2.6 lacks the last one.

Whether a scale belongs to them is for the reader of a checkpoint to decide.
"""
LFS_POINTER = b"version https://git-lfs"
"""Start of the file that Git LFS leaves in place of one that is not downloaded."""
_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`; ValueError for a folder, a pipe, a device, or a link to nowhere."""
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ValueError(f"{path} is {kind}, a file was expected")
    if mode is None and _mode(path, follow=False) is not None:
        raise ValueError(f"{path} is a link that leads nowhere or to itself")
    return mode is not None


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path`."""
    return stat.S_ISDIR(_mode(path) or 0)


def _mode(path: Path, *, follow: bool = True) -> int | None:
    try:
        return path.stat(follow_symlinks=follow).st_mode
    except (OSError, ValueError):  # no file system holds the name: too long, or with a null character
        return None


def require_file(path: Path) -> None:
    """Accept a regular file; FileNotFoundError without one, ValueError for a pointer of Git LFS."""
    if not is_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, its contents were not downloaded: run git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for a damaged file, another value, or a key that occurs twice."""
    require_file(path)
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, content: bytes | str) -> dict[str, Any]:
    """The object in JSON that was read from `path`, as `read_json` validates it."""
    try:
        data = json.loads(content if isinstance(content, str) else content.decode(), object_pairs_hook=_object)
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


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return data


def value_of(path: Path, data: Mapping[str, Any], key: str, kind: type, *, within: str = "", null: bool = False) -> Any:
    """The value of a key in a JSON object, of the expected kind; None if `null` allows it to be null or missing.

    `kind` is ``dict``, ``list``, ``str``, ``int`` or ``bool``; true and false are no whole numbers. The message of the
    ValueError holds `path` and `within`, the position of the object in the file.
    """
    value = data.get(key)
    if (null and value is None) or is_of_kind(value, kind):
        return value
    found = f"{value!r:.80}" if key in data else "missing"
    expected = f"{_KINDS[kind]}{' or null' if null else ''}"
    raise ValueError(f"{path}: {f'{within}: ' if within else ''}{key!r} is {found}, {expected} was expected")


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number; true and false, which are numbers to Python, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a number of JSON; true and false are none."""
    return is_whole(value) or isinstance(value, float)


def is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of this kind, as `value_of` has them."""
    return is_whole(value) if kind is int else isinstance(value, kind)


def number(path: Path, key: str, value: Any) -> float:
    """The value as a float; ValueError unless it is a finite number that fits one."""
    try:
        if is_number(value) and math.isfinite(value):
            return float(value)
    except OverflowError:  # JSON's whole numbers have no bound
        pass
    raise ValueError(f"{path}: {key!r} is {value!r:.80}, a finite number was expected")


@dataclass(frozen=True)
class TensorFile:
    """An opened file of tensors, which are read on demand."""

    path: Path
    source: Any
    """A ``safe_open``; or name to tensor (of a torch file), or to the `TensorFile` of a shard."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.source.keys())

    @property
    def metadata(self) -> Mapping[str, str]:
        """Text in the header of a safetensors file."""
        return {} if isinstance(self.source, Mapping) else self.source.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        if not isinstance(self.source, Mapping):
            return tuple(self.source.get_slice(name).get_shape())
        entry = self.source[name]
        return entry.shape(name) if isinstance(entry, TensorFile) else tuple(entry.shape)

    def stored(self, name: str) -> Tensor:
        """A tensor as it is stored; ValueError if it is missing, or of a type that torch does not have."""
        try:
            if not isinstance(self.source, Mapping):
                tensor: Tensor = self.source.get_tensor(name)
                return tensor
            entry = self.source[name]
            return entry.stored(name) if isinstance(entry, TensorFile) else entry
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{self.path}: {name} cannot be read: {error}") from error

    def read(self, name: str) -> Tensor:
        """A tensor in float32, validated by `finite_floats`."""
        return finite_floats(self.stored(name), self.path, name)

    def keeping(self, count: int) -> "TensorFile":
        """The same file, which keeps the last `count` tensors that were read in float32."""
        return _KeepingFile(self.path, self.source, lru_cache(maxsize=count)(self.read))


@dataclass(frozen=True)
class _KeepingFile(TensorFile):
    kept: Callable[[str], Tensor]

    def read(self, name: str) -> Tensor:
        """A tensor in float32, which is not to be changed: the next call may return the same one."""
        return self.kept(name)


def open_file(path: Path) -> TensorFile:
    """A file of tensors: safetensors, a torch file of nothing but tensors, or an index of shards.

    Safetensors are mapped, not held open. Torch files are read with ``weights_only=True``: any other object in them is
    refused, never built. ValueError for damaged files, other kinds, and an index that contradicts its shards.
    """
    require_file(path)
    if path.name.endswith(INDEX):
        return TensorFile(path, _open_shards(path))
    if path.suffix in TORCH_FILES:
        return TensorFile(path, _load_torch(path))
    try:
        return TensorFile(path, safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in a file, from its header; errors are those of `open_file`."""
    file = open_file(path)
    return {name: file.shape(name) for name in file.names}


def shards_of(index: Path) -> dict[str, Path]:
    """Tensor to its shard, as the index has it; ValueError if one is not a file beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: key 'weight_map' is missing or not an object")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and Path(shard).name == shard and shard not in ("", "..")
        if not plain or "\\" in shard or shard.endswith(INDEX):
            expected = "the name of a file beside the index was expected"
            raise ValueError(f"{index}: {name} is said to be in {shard!r}: {expected}")
    return {name: index.parent / shard for name, shard in weight_map.items()}


def _open_shards(index: Path) -> dict[str, TensorFile]:
    expected = shards_of(index)
    files: dict[str, TensorFile] = {}
    for shard in sorted(set(expected.values())):
        try:
            opened = open_file(shard)
        except FileNotFoundError:
            raise FileNotFoundError(f"{shard} does not exist, though {index.name} names it") from None
        for name in opened.names:
            if files.setdefault(name, opened) is not opened:
                raise ValueError(f"{name} is in {files[name].path} and in {shard.name}: which one is meant is unknown")
    for name, shard in expected.items():
        if name not in files or files[name].path != shard:
            raise ValueError(f"{shard} lacks {name}, though {index.name} names it")
    return files


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything, and of those few are declared
        problem = "a pickle of more than tensors, which is refused unread"
        if not isinstance(error, pickle.UnpicklingError):
            cause = str(error).partition("\n")[0] or type(error).__name__
            problem = f"truncated, or a pickle of the old kind, which is not read ({cause})"
        raise ValueError(f"{path} is {problem}: save as safetensors") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds a {type(content).__name__}, a mapping from names to tensors was expected")
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is no name of a tensor, text was expected")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"{path}: {name} is stored as {kind}, a dense tensor was expected")
    return dict(content)


def finite_floats(tensor: Tensor, path: Path, name: str) -> Tensor:
    """The tensor in float32; ValueError for NaN or infinite numbers, and for integers, booleans or complex numbers."""
    if tensor.dtype not in (*NUMBERS, *FLOAT8):
        kind = str(tensor.dtype).removeprefix("torch.")
        remedy = "floating-point numbers are needed: save it dequantised"
        raise ValueError(f"{path}: {name} is stored as {kind}: codes of a quantised tensor, or no weights; {remedy}")
    tensor = tensor.float()
    # one pass without a mask: both ends are NaN where anything is
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise ValueError(f"{path}: {name} contains NaN or infinite numbers; the run has diverged")
    return tensor
