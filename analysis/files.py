"""Paths as callers give them, and atomic replacement of files."""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def as_paths(call: str, paths: Iterable[object]) -> list[Path]:
    """The paths of a call that takes several of them; TypeError for a list, or anything else, in place of a path."""
    given = []
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            what = f"path is text or a Path, got a {type(path).__name__}: give one after the other"
            raise TypeError(f"{call}: a {what}, {call}(first, second) or {call}(*paths)")
        given.append(Path(path))
    return given


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`. It replaces `path` when the block ends, and is removed if the block fails.

    Missing folders are made. The file's mode is that of any new file: 0666 less the umask.

    Raises:
        IsADirectoryError: `path` is a folder.
        NotADirectoryError: a part of the path above it is a file.
        OSError: the file cannot be written; the message names `path`.
    """
    require_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, so no file can be written there: choose another name")
    new = path.parent / f".{uuid.uuid4().hex}.part{path.suffix}"  # writers choose their format by the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.touch(exist_ok=False)
        mode = new.stat().st_mode & 0o777
        yield new
        os.chmod(new, mode)  # a writer may have put a file of its own there
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        if error.filename is None or Path(error.filename) == new:  # a full disk is an error without a name
            if error.errno is None:  # of a library, which has a message alone
                raise type(error)(f"{path}: {error}") from error
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        new.unlink(missing_ok=True)


LONGEST = 100
"""Characters of a folder's name in that of an unfinished one; file systems take 255 bytes."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`. It becomes `folder` when the block ends, and is removed if the block fails.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        NotADirectoryError: a part of the path is a file.
    """
    require_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: adapters are written into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name[:LONGEST]}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        unfinished.replace(folder)  # takes the place of an empty folder too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_folder(folder: Path) -> None:
    """Raise for a folder that can neither be used nor made, since a file stands in its way.

    Raises:
        NotADirectoryError: the folder or one above it is a file.
    """
    for part in (folder, *folder.parents):
        if part.is_dir():
            return
        if part.exists() or part.is_symlink():
            raise NotADirectoryError(f"{part} is a file, a folder is needed there: choose another folder")
