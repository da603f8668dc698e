"""Verification of a downloaded folder: missing and damaged files, and where each belongs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from manifold_cl.files import FileError
from manifold_cl.streams.captions import read_captions
from manifold_cl.streams.instructions import Problem, inspect_instructions
from manifold_cl.streams.layout import Layout, TaskFiles

Part = Literal["train", "test"]
SHOWN = 5
"""Number of missing images that a message names."""

__all__ = ["FileReport", "TaskReport", "find_file", "find_image", "verify_folder"]


@dataclass(frozen=True)
class FileReport:
    """One file of a task: its path, its number of items, and its problems."""

    part: str
    path: str
    found: bool
    items: int = 0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskReport:
    """One task: its files and its images."""

    task: str
    files: tuple[FileReport, ...]
    images: int
    missing_images: tuple[str, ...]
    image_problem: str = ""

    @property
    def complete(self) -> bool:
        """Whether the task can be learned from this folder."""
        return not self.missing_images and all(file.found and not file.problems for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"complete": self.complete, **asdict(self)}


def verify_folder(folder: Path | str, layout: Layout, *, tasks: Sequence[str] | None = None) -> list[TaskReport]:
    """One report per task; a problem in one task does not stop the verification of the others.

    Instruction files are read completely. Images must exist, but are not opened.

    Args:
        folder: what the user downloaded.
        layout: what should be in it.
        tasks: names of the tasks to check; all by default.

    Raises:
        FileError: when the folder itself does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"{folder} is no folder: create it and put the data there")
    chosen = [task for task in layout.tasks if tasks is None or task.name in tasks]
    return [_checked(folder, layout, task) for task in chosen]


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that is a file in ``folder``."""
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)  # false for a name too long


def find_image(folder: Path, roots: Sequence[str], image: str) -> Path | None:
    """The image under the first of ``roots`` that has it."""
    return find_file(folder, [f"{root}/{image}" for root in roots])


def _checked(folder: Path, layout: Layout, task: TaskFiles) -> TaskReport:
    files: list[FileReport] = []
    images: dict[str, None] = {}
    counts: dict[str, int] = {}
    parts: tuple[Part, Part] = ("train", "test")
    for part in parts:
        path = find_file(folder, getattr(task, part))
        if path is None:
            files.append(_absent(folder, part, getattr(task, part)))
            continue
        items, problems = inspect_instructions(path, text_only=task.text_only)
        counts[part] = len(items)
        images.update(dict.fromkeys(image for item in items for image in item.images))
        files.append(FileReport(part, str(path), True, len(items), _said(problems)))
    if task.captions:
        files.append(_captions(folder, task, counts.get("test")))
    missing = tuple(image for image in images if find_image(folder, layout.roots(task), image) is None)
    return TaskReport(task.name, tuple(files), len(images), missing, _where(folder, layout.roots(task), missing))


def _captions(folder: Path, task: TaskFiles, expected: int | None) -> FileReport:
    path = find_file(folder, task.captions)
    if path is None:
        return _absent(folder, "captions", task.captions)
    try:
        found = read_captions(path)
    except FileError as error:
        return FileReport("captions", str(path), True, 0, (str(error),))
    said: tuple[str, ...] = ()
    if expected is not None and len(found) != expected:
        said = (f"{path}: captions of {len(found)} images for {expected} test items",)
    return FileReport("captions", str(path), True, len(found), said)


def _absent(folder: Path, part: str, names: Sequence[str]) -> FileReport:
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    return FileReport(part, str(folder / names[0]), False, 0, (f"missing: {folder / names[0]}{others}",))


def _said(problems: Sequence[Problem]) -> tuple[str, ...]:
    return tuple(str(problem) for problem in problems)


def _where(folder: Path, roots: Sequence[str], missing: Sequence[str]) -> str:
    if not missing:
        return ""
    shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
    places = " or ".join(str(folder / root) for root in roots)
    return f"{len(missing)} images are missing: {shown}; they belong under {places}"
