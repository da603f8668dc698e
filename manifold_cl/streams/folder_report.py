"""Verification of a downloaded folder: missing and damaged files, and where each belongs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manifold_cl.files import FileError
from manifold_cl.lists import listed
from manifold_cl.streams.captions import read_captions
from manifold_cl.streams.instructions import inspect_instructions
from manifold_cl.streams.layout import Layout, TaskFiles

SHOWN = 5
"""Number of missing images that a message names."""


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
        folder: of the user's download.
        layout: describes the files that it should have.
        tasks: names of the tasks to verify; all by default.

    Raises:
        FileError: when the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"{folder} is no folder: create it and put the data there")
    return [_verify(folder, layout, task) for task in layout.tasks if tasks is None or task.name in tasks]


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that is a file in ``folder``."""
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)  # false for a name too long


def find_image(folder: Path, roots: Sequence[str], image: str) -> Path | None:
    """The image under the first of ``roots`` that has it."""
    return find_file(folder, [f"{root}/{image}" for root in roots])


def locations(folder: Path, names: Sequence[str]) -> str:
    """The paths of ``names`` in ``folder``, for messages."""
    return " or ".join(str(folder / name) for name in names)


def _verify(folder: Path, layout: Layout, task: TaskFiles) -> TaskReport:
    roots = layout.roots(task)
    images: dict[str, None] = {}
    counts: dict[str, int] = {}

    def read(part: str, path: Path) -> tuple[int, tuple[str, ...]]:
        """The number of items, and the problems."""
        if part == "captions":
            captions, expected = len(read_captions(path)), counts.get("test")
            fits = expected is None or captions == expected
            return captions, () if fits else (f"{path}: captions of {captions} images for {expected} test items",)
        items, problems = inspect_instructions(path, text_only=task.text_only)
        counts[part] = len(items)
        images.update(dict.fromkeys(image for item in items for image in item.images))
        return len(items), tuple(map(str, problems))

    def report(part: str, names: Sequence[str]) -> FileReport:
        path = find_file(folder, names)
        if path is None:
            others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            return FileReport(part, str(folder / names[0]), False, 0, (f"missing: {folder / names[0]}{others}",))
        try:
            return FileReport(part, str(path), True, *read(part, path))
        except FileError as error:
            return FileReport(part, str(path), True, 0, (str(error),))

    files = [report("train", task.train), report("test", task.test)]
    if task.captions:
        files.append(report("captions", task.captions))
    missing = tuple(image for image in images if find_image(folder, roots, image) is None)
    problem = ""
    if missing:
        where = locations(folder, roots)
        problem = f"{len(missing)} images are missing: {listed(missing, SHOWN)}; they belong under {where}"
    return TaskReport(task.name, tuple(files), len(images), missing, problem)
