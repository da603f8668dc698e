"""Functions that run on a node of a cluster: verification of the node, and one cell. They import no cluster library."""

from __future__ import annotations

import platform
import queue
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manifold_cl.continual.environment import library_versions
from manifold_cl.files import write_atomically, write_json
from manifold_cl.study.estimate import Costs, measure_costs
from manifold_cl.study.events import Event
from manifold_cl.study.plan import Cell, StudyPlan
from manifold_cl.study.processes import log_of, workers

TOKEN = ".engine-token"
"""File in the folder of a study whose content shows a node that it sees the caller's folder."""
PERIOD = 0.5
"""Seconds between two messages to the caller."""

Files = Mapping[str, bytes]
"""Path relative to the folder of a study → content."""
Send = Callable[[Sequence[Event], Files], None]
"""Takes events, and files to copy into the caller's folder."""


@dataclass(frozen=True)
class Package:
    """A plan, as plain data that travels to a node.

    Args:
        content: of ``study.json``.
        code_folder: of the plan, as text.
        digests: name of a task → digest of its data where the study was started; without those that have none.
    """

    content: Mapping[str, Any]
    code_folder: str | None
    digests: Mapping[str, str]

    @classmethod
    def of(cls, plan: StudyPlan) -> Package:
        """The package of a plan."""
        folder = None if plan.code_folder is None else str(plan.code_folder.resolve())
        return cls(plan.to_dict(), folder, _digests(plan))

    def plan(self) -> StudyPlan:
        """The plan in the package."""
        return StudyPlan.from_dict(self.content, code_folder=self.code_folder)


def verify_node(package: Package) -> dict[str, str]:
    """The versions of the libraries of this machine, once it has the stream's data; archives are downloaded.

    Raises:
        ValueError: the stream cannot be opened here, or has other data than where the study was started.
    """
    plan = package.plan()
    try:
        digests = _digests(plan)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise ValueError(f"the stream {plan.stream!r} cannot be opened there ({error})") from None
    if differing := [name for name, digest in package.digests.items() if digests.get(name) != digest]:
        raise ValueError(f"the stream {plan.stream!r} has other data there for {', '.join(differing)}")
    return library_versions()


def measure_node(package: Package, labels: Sequence[str]) -> Costs:
    """`measure_costs` on this machine."""
    return measure_costs(package.plan(), labels, lambda label: None)


def run_on_node(
    package: Package, name: str, folder: str, token: str, files: Files, versions: Mapping[str, str], send: Send
) -> tuple[Event, Files | None]:
    """Run one cell in a process of its own; its last event, and all its files unless they are in the caller's folder.

    A node that sees the caller's folder writes there. Another one starts from ``files`` in a temporary folder, and
    sends new files after each task, so that the cell can resume elsewhere.

    Args:
        package: the plan.
        name: of the cell.
        folder: of the study, on the caller's machine.
        token: the content of `TOKEN` there; empty to use a temporary folder in any case.
        files: of the cell so far.
        versions: of libraries; others are an error.
        send: called every `PERIOD` with the events since.

    Raises:
        ValueError: other versions.
    """
    plan = package.plan()
    cell = plan.cell(name)
    if differing := version_differences(library_versions(), versions):
        raise ValueError(f"the node {platform.node()} has other versions than the nodes before: {differing}")
    if token and _token(Path(folder)) == token:
        return _run(plan, cell, Path(folder), lambda events: send(events, {})), None
    with tempfile.TemporaryDirectory(prefix="manifold-cl-") as place:
        here = Path(place)
        write_files(here, files)
        write_json(here / "study.json", package.content)
        copies = _Copies(here, cell)
        last = _run(plan, cell, here, lambda events: send(events, copies.after(events)))
        if last.kind == "failed":
            last = replace(last, message=last.message.replace(str(here), folder))
        return last, read_files(here, cell)


def version_differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Differing versions in words; empty if there are none.

    >>> version_differences({"torch": "2.6.0", "numpy": "2.1.0"}, {"torch": "2.7.0", "numpy": "2.1.0"})
    'torch 2.6.0 instead of 2.7.0'
    """
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name, 'missing')} instead of {here.get(name, 'missing')}" for name in names)


def read_files(folder: Path, cell: Cell) -> dict[str, bytes]:
    """The files of a cell in a study's folder, without locks and unfinished ones."""
    return {path: (folder / path).read_bytes() for path in _paths(folder, cell)}


def write_files(folder: Path, files: Files) -> None:
    """Write files into a study's folder, each atomically, the record last: it states what is complete."""
    for path in sorted(files, key=lambda path: (path.endswith("record.json"), path)):
        write_atomically(folder / path, files[path])


def _run(plan: StudyPlan, cell: Cell, folder: Path, send: Callable[[Sequence[Event]], None]) -> Event:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with workers(plan, folder, events) as start:
        start(cell)
        while True:
            batch = [replace(e, message=platform.node()) if e.kind == "started" else e for e in _batch(events)]
            if batch and batch[-1].ends:
                send(batch[:-1])
                return batch[-1]
            if batch:
                send(batch)


def _batch(events: queue.SimpleQueue[Event]) -> Iterator[Event]:
    """The events of one `PERIOD`; of consecutive ones about progress, the last."""
    waiting: Event | None = None
    try:
        while True:
            event = events.get(timeout=PERIOD) if waiting is None else events.get_nowait()
            if waiting is not None and (event.kind != "progress" or event.task != waiting.task):
                yield waiting
            waiting = event if event.kind == "progress" else None
            if waiting is None:
                yield event
                if event.ends:
                    return
    except queue.Empty:
        if waiting is not None:
            yield waiting


class _Copies:
    """The files of a cell that were written since the last finished task."""

    def __init__(self, folder: Path, cell: Cell) -> None:
        self._folder, self._cell = folder, cell
        self._sent, self._task = self._state(), 0

    def after(self, events: Sequence[Event]) -> dict[str, bytes]:
        """New files, if the events show that a further task began; else none."""
        task = max((event.task for event in events if event.kind == "progress"), default=0)
        if task <= self._task:
            return {}
        self._task, before, self._sent = task, self._sent, self._state()
        return {path: (self._folder / path).read_bytes() for path in self._sent if before.get(path) != self._sent[path]}

    def _state(self) -> dict[str, tuple[int, int]]:
        statuses = {path: (self._folder / path).stat() for path in _paths(self._folder, self._cell)}
        return {path: (status.st_mtime_ns, status.st_size) for path, status in statuses.items()}


def _paths(folder: Path, cell: Cell) -> list[str]:
    found = [path for path in (folder / "cells" / cell.name).rglob("*") if path.is_file()]
    kept = [path for path in found if path.suffix not in (".lock", ".tmp")]
    if log_of(folder, cell).is_file():
        kept.append(log_of(folder, cell))
    return [path.relative_to(folder).as_posix() for path in kept]


def _token(folder: Path) -> str | None:
    try:
        return (folder / TOKEN).read_text(encoding="utf-8")
    except OSError:
        return None


def _digests(plan: StudyPlan) -> dict[str, str]:
    tasks = plan.open_stream(next(iter(plan.orders))).tasks
    return {task.name: digest for task in tasks if (digest := task.digest())}


@contextmanager
def shared_token(folder: Path, token: str) -> Iterator[None]:
    """A context in which ``folder`` has the file `TOKEN` with this content."""
    write_atomically(folder / TOKEN, token.encode())
    try:
        yield
    finally:
        (folder / TOKEN).unlink(missing_ok=True)
