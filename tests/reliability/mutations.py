"""Changes of a file's bytes, of its JSON and of its version, each drawn from a seed; and the verdict on a reader."""

import dataclasses
import hashlib
import json
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

import analysis
import manifold_cl

PATIENCE = 20
"""Seconds after which a reader counts as one that hangs."""
ROOTS = tuple(str(Path(package.__file__).parent) for package in (manifold_cl, analysis))
KINDS = (ValueError, TypeError, OSError, RuntimeError)
"""Kinds of errors that the packages raise; they must be raised by their own code."""
ODD = (
    None,
    [],
    {},
    "text",
    "",
    -1,
    0,
    7,
    1.5,
    1e308,
    10**400,
    True,
    [[]],
    {"a": None},
    "../up",
    "\ud800",
    float("nan"),
)
"""Values that an edit puts in place of another one."""
VERSIONS = (0, 99, -1, "1", 1.5, None, True)


def truncated(content: bytes, draw: Random) -> bytes:
    return content[: draw.randrange(len(content))]


def emptied(content: bytes, draw: Random) -> bytes:
    return b""


def flipped(content: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def zeroed(content: bytes, draw: Random) -> bytes:
    at, size = draw.randrange(len(content)), draw.randrange(1, 513)
    return (content[:at] + bytes(size) + content[at + size :])[: len(content)]


def repeated(content: bytes, draw: Random) -> bytes:
    at, size = draw.randrange(len(content)), draw.randrange(1, 65)
    return content[: at + size] + content[at:]


def exchanged(content: bytes, draw: Random) -> bytes:
    """Two parts of equal length swapped."""
    size = draw.randrange(1, max(2, len(content) // 4))
    one = draw.randrange(max(1, len(content) - 2 * size))
    other = draw.randrange(one + size, max(one + size + 1, len(content) - size + 1))
    return (
        content[:one]
        + content[other : other + size]
        + content[one + size : other]
        + content[one : one + size]
        + content[other + size :]
    )


def extended(content: bytes, draw: Random) -> bytes:
    return content + draw.randbytes(draw.randrange(1, 100))


def edited(content: bytes, draw: Random) -> bytes:
    """A value in JSON replaced by an odd one or deleted, as by hand: without the checksum."""
    return _rewritten(content, lambda value: _edit(value, draw))


def of_another_version(content: bytes, draw: Random) -> bytes:
    """The same file with another version in it."""
    version = draw.choice(VERSIONS)
    return _rewritten(content, lambda value: {**value, "version": version} if isinstance(value, dict) else [version])


BYTES = (truncated, emptied, flipped, zeroed, repeated, exchanged, extended)
"""Mutations of any file."""


def _rewritten(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """JSON, or the manifest of a safetensors file or its header, changed and with fitting checksums."""
    if content[:1] in (b"{", b"["):
        value = json.loads(content)
        if isinstance(value, dict):
            value.pop("checksum", None)
        return json.dumps(change(value)).encode()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if "manifest" in metadata:
        metadata["manifest"] = json.dumps(change(json.loads(metadata["manifest"])))
        metadata["sha256"] = "0" * 64
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        before, _, after = text.rpartition(b"0" * 64)
        text = before + hashlib.sha256(text).hexdigest().encode() + after
    else:
        text = json.dumps(change(header)).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _edit(value: Any, draw: Random) -> Any:
    places = list(_places(value))
    if not places:
        return draw.choice(ODD)
    holder, key = draw.choice(places)
    if isinstance(holder, dict) and draw.random() < 0.25:
        del holder[key]
    else:
        holder[key] = draw.choice(ODD)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list with every key of it, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def plain(value: Any) -> Any:
    """A value whose ``repr`` is equal for equal contents, bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().flatten().tolist()
    if isinstance(value, nn.Module):
        return plain(value.state_dict())
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


@contextmanager
def patience() -> Iterator[None]:
    """AssertionError for code that does not end."""

    def late(*_: object) -> None:
        raise AssertionError(f"the reader did not end within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], Any], path: Path) -> str:
    """``repr`` of what a reader returns, or ``"refused"``; AssertionError for an error that is not the packages' own.

    Their errors are raised by their own code and name the file, or a folder above it.
    """
    try:
        with patience(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return repr(plain(read()))
    except Exception as error:
        problem = fault(error, path)
    assert not problem, problem  # outside the handler: the text of the error may be what no report can hold
    return "refused"


def fault(error: Exception, path: Path) -> str:
    """The traceback of an error that a library raised, or that names neither the file nor a folder above it."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    names = (path.name, path.parent.name, path.parent.parent.name)
    if isinstance(error, KINDS) and last.startswith(ROOTS) and any(name in str(error) for name in names):
        return ""
    return "".join(traceback.format_exception(error)).encode("ascii", "backslashreplace").decode()
