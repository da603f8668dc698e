"""Checks of files before they are opened, and JSON whose damage is named."""

import json
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
