"""Several files replaced at one moment: whoever reads the folder finds the old ones or the new ones, never a mixture.

No system call renames two files together, so the names are turned into links first. They lead through one link,
``now``, to the old files; renaming that one link to the new files is the moment of the change. Then the new files take
the place of the links. Killed at any moment, the names still lead to one complete set of files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

OLD, NEW, NOW = "old", "new", "now"


@contextmanager
def replaced_together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A new, empty folder for the files ``names``; they replace those in ``folder`` when the context ends.

    Where the context ends with an error, the old files stay. Writers of one folder wait for each other. On a file
    system without links the last name's old file is deleted first: a killed write is then noticed, not survived.

    Args:
        folder: of the files; it is made if need be.
        names: of the files; all must be written inside the context. The last one is the one that readers start from.

    Raises:
        OSError: when a file cannot be written, or something that is not a file has its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder):
        stage = _new_stage(folder, names[0])
        try:
            yield stage / NEW
            for name in names:
                if (folder / name).exists() and not (folder / name).is_file():
                    raise OSError(f"{folder / name} is not a regular file: delete it, or choose another folder")
                with (stage / NEW / name).open("rb+") as file:
                    os.fsync(file.fileno())
            _change(folder, stage, names)
        finally:
            _delete_unused_stages(folder, names)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _change(folder: Path, stage: Path, names: Sequence[str]) -> None:
    if any(os.path.lexists(folder / name) for name in names):
        if _link_old(folder, stage, names):
            for name in names:
                _point(folder / name, f"{stage.name}/{NOW}/{name}", stage)
            (stage / "link").symlink_to(NEW)
            (stage / "link").replace(stage / NOW)  # the change
        else:
            (folder / names[-1]).unlink(missing_ok=True)
    for name in names:
        (stage / NEW / name).replace(folder / name)
    sync_folder(folder)


def _link_old(folder: Path, stage: Path, names: Sequence[str]) -> bool:
    """Give the old files a second name in ``stage``; False where the file system has no links."""
    try:
        for name in names:
            if (folder / name).exists():
                os.link(os.path.realpath(folder / name), stage / OLD / name)
        (stage / NOW).symlink_to(OLD)
    except OSError:
        return False
    return True


def _point(path: Path, target: str, stage: Path) -> None:
    """Put a link to ``target`` in the place of ``path``."""
    (stage / "link").symlink_to(target)
    (stage / "link").rename(path)


def _new_stage(folder: Path, name: str) -> Path:
    number = 0
    while True:
        stage = folder / f".{name}.{number}.staged"
        with suppress(FileExistsError):
            stage.mkdir()
            break
        number += 1  # of a killed writer, and perhaps still in use by the links
    (stage / OLD).mkdir()
    (stage / NEW).mkdir()
    return stage


def _delete_unused_stages(folder: Path, names: Sequence[str]) -> None:
    """Delete what writers, this one and killed ones, left behind and no name leads to."""
    used = {os.readlink(folder / name).split("/")[0] for name in names if (folder / name).is_symlink()}
    for stage in folder.glob(f".{names[0]}.*.staged"):
        if stage.name not in used:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process replaces files here; the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # network file systems may have no locks on folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
