"""Atomic text, JSON and TOML files, and the error that names a file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from manifold_cl.kinds import is_whole

VERSION = 1
"""The version of JSON formats."""
RESTORE = "restore it, or delete its folder"
CHECKSUM = "checksum"
"""Key of the checksum of a JSON file with a format; files without one are read unverified."""


class FileError(ValueError):
    """A file that is missing, damaged, or of another kind than expected; the message names it."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces ``path`` when the context ends without an error; OSError names ``path``.

    The content is flushed to the disk and renamed, so that ``path`` is the old file or the new one at every moment.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file: delete it, or choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot flush a folder
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the rename survives a power cut
        finally:
            os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, or leave it untouched."""
    with replacing(path) as file:
        file.write(content)


def checksum_of(content: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object without its ``checksum``: of its compact text, keys in their order."""
    without = {key: value for key, value in content.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(without, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` atomically as indented JSON, with a checksum at its end if it has a ``format``.

    NaN is refused: unknown numbers are null.
    """
    if "format" in content:
        content = {**content, CHECKSUM: checksum_of(content)}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def loads(text: str) -> Any:
    """The value in JSON; ValueError if it is malformed, or if a key comes twice in an object."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return content


def require_file(path: Path, missing: str = "does not exist") -> None:
    """Raise FileError for a path that is missing, a folder, a pipe or a device."""
    if not path.is_file():
        kind = f"is not a regular file{', but a folder' if path.is_dir() else ''}"
        raise FileError(f"{path} {kind if path.exists() else missing}")


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns errors about content, such as a missing key or a word in place of a number, into a FileError."""
    try:
        yield
    except FileError:
        raise
    except KeyError as error:
        raise FileError(f"{path} lacks the key {error}: {RESTORE}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror})") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError, re.error) as error:
        raise FileError(f"{path} does not follow its format ({error}): {RESTORE}") from error


@contextmanager
def library_errors(source: Path | str, library: str) -> Iterator[None]:
    """Turns an error of any kind, by which a library refuses a local file or folder, into a FileError.

    Errors about other sources, such as names on a hub, keep their kind, as does the lack of a library.
    """
    try:
        yield
    except (FileError, ImportError, MemoryError):
        raise
    except Exception as error:  # libraries declare few of the kinds that damaged files raise
        if not Path(source).exists():
            raise
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(
            f"{source} cannot be read by {library} ({cause}): download it again, or save it again"
        ) from error


def is_missing_folder(model: Path | str) -> bool:
    """Whether this is the path of a folder that does not exist, and no name on a hub."""
    path, name = Path(model), str(model)
    return not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1)


def complete_model(load: Callable[..., Any], source: Path | str, **options: Any) -> Any:
    """The model that ``load``, a ``from_pretrained`` of transformers, reads from a folder or a name on a hub.

    Raises:
        FileError: for a folder that is missing or cannot be read, or a checkpoint that lacks weights of its model,
            which transformers draws at random.
    """
    if is_missing_folder(source):
        raise FileError(f"model {source} does not exist: give a folder, or a name of the hub")
    with library_errors(source, "transformers"):
        model, report = load(source, output_loading_info=True, **options)
    if names := sorted(report["missing_keys"]):
        raise FileError(
            f"{source} lacks {len(names)} weights of the model, such as {names[0]}: give the complete checkpoint"
        )
    return model


def read_text(path: Path) -> str:
    """The text of a file; FileError when it is missing, not a regular file, or not UTF-8."""
    require_file(path)  # reading a pipe would never end
    with file_errors(path):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{path} is damaged or truncated ({error}): {RESTORE}") from None


def read_json(path: Path, *, expected: str, version: int = VERSION, remedy: str = RESTORE) -> dict[str, Any]:
    """The JSON object at ``path``, whose ``format`` must be ``expected``.

    Args:
        path: the file.
        expected: its format.
        version: the latest version that can be read.
        remedy: ends the message about a damaged file.

    Raises:
        FileError: when it is missing, truncated, of another format or of a later version.
    """
    return parse_json(path, read_text(path), expected, version=version, remedy=remedy)


def parse_json(
    path: Path, text: str, expected: str, *, version: int = VERSION, remedy: str = RESTORE
) -> dict[str, Any]:
    """The JSON object ``text`` that was read from ``path``, as `read_json` validates it."""
    try:
        content = loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise FileError(f"{path} is damaged or truncated ({error}): {remedy}") from None
    actual = content.get("format") if isinstance(content, dict) else None
    if actual != expected:
        raise FileError(f"{path} is not of format {expected!r} (found {actual!r})")
    written = content.get("version", 1)
    if not is_whole(written) or written < 1:
        raise FileError(f"{path} has version {written!r}, a whole number from 1 on is needed: {remedy}")
    if written > version:
        readable = "version 1" if version == 1 else f"versions 1 to {version}"
        raise FileError(f"{path} has version {written} of {expected}, {readable} can be read: update manifold-cl")
    if CHECKSUM in content and content.pop(CHECKSUM) != checksum_of(content):
        raise FileError(
            f"{path} was changed or damaged, it does not match its {CHECKSUM!r}: {remedy}; after a change by hand, "
            "delete that entry"
        )
    return dict(content)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; FileError when it is missing or malformed."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path} is not a TOML file: {error}") from None
