"""Supervisor of a study: runs its cells in several processes and resumes interrupted ones."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from manifold_cl.continual import RunRecord
from manifold_cl.continual.record import config_differences
from manifold_cl.files import FileError
from manifold_cl.streams.registry import is_code
from manifold_cl.study.plan import Cell, StudyPlan


@dataclass(frozen=True)
class Event:
    """An event in a cell, for progress displays."""

    cell: Cell
    kind: Literal["started", "progress", "note", "done", "failed"]
    message: str = ""
    task: int = 0
    tasks: int = 0
    phase: str = ""
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class CellFailure:
    """A cell that did not finish, with the reason."""

    cell: Cell
    reason: str


class Study:
    """A plan and the folder of its results.

    Args:
        plan: of the study.
        folder: receives ``study.json``, one run folder per cell under ``cells/``, and its log under ``logs/``.
    """

    def __init__(self, plan: StudyPlan, folder: Path | str) -> None:
        self.plan = plan
        self.folder = Path(folder)

    def validate(self, *, extend: bool = False) -> None:
        """Raise FileError with the differences if ``study.json`` or a record has another configuration than the plan.

        With ``extend`` the plan may have further methods, seeds and orders. Nothing is written.
        """
        if (self.folder / "study.json").exists():
            old = StudyPlan.load(self.folder)
            extends = self.plan.extends(old)
            if (changes := old.changes(self.plan)) and not (extend and extends):
                hint = " (--extend adds cells to it)" if extends else ""
                raise FileError(f"{self.folder} holds a study of another configuration{hint}: {'; '.join(changes)}")
        others = [
            f"cells/{cell.name} ({', '.join(changes)})"
            for cell, record in self.records().items()
            if (changes := config_differences(record.config, self.plan.make_runner(cell, self.folder).config))
        ]
        if others:
            more = f" (and {len(others) - 3} more)" if len(others) > 3 else ""
            raise FileError(
                f"{self.folder} holds runs of another configuration: {'; '.join(others[:3])}{more}: delete those "
                "folders to run the cells again, or choose another folder"
            )

    def records(self) -> dict[Cell, RunRecord]:
        """The readable records of cells, complete or not."""
        records = {}
        for cell in self.plan.cells:
            with suppress(FileError):
                records[cell] = RunRecord.load(self.folder / "cells" / cell.name)
        return records

    def pending(self) -> list[Cell]:
        """The cells that are not complete, started ones first."""
        records = self.records()
        pending = [cell for cell in self.plan.cells if cell not in records or records[cell].status != "complete"]
        return sorted(pending, key=lambda cell: cell not in records)

    def run(self, *, extend: bool = False, on_event: Callable[[Event], None] = lambda event: None) -> list[CellFailure]:
        """Run all cells that are not complete, and return the failures.

        After an interruption, the same call resumes each cell from its last finished task, to the same numbers.

        Raises:
            FileError: the folder holds another study, or another process is running this one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / "study.lock", timeout=0).acquire()
        except Timeout:
            raise FileError(f"another process is at work on {self.folder}: wait for it, or stop it") from None
        with lock:
            self.validate(extend=extend)
            self.plan.save(self.folder)
            return self._run(self.pending(), on_event)

    def _run(self, cells: Sequence[Cell], on_event: Callable[[Event], None]) -> list[CellFailure]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        failures, waiting, running = [], list(cells), 0
        with _workers(self.plan, self.folder, events) as start:
            while waiting or running:
                while waiting and running < self.plan.processes:
                    start(waiting.pop(0))
                    running += 1
                event = events.get()
                on_event(event)
                running -= event.kind in ("done", "failed")
                if event.kind == "failed":
                    failures.append(CellFailure(event.cell, event.message))
        return failures


@contextmanager
def _workers(plan: StudyPlan, folder: Path, events: queue.SimpleQueue[Event]) -> Iterator[Callable[[Cell], None]]:
    """A function that starts the worker of a cell; workers still running at the end are killed."""
    running: list[subprocess.Popen[str]] = []
    code = [str(plan.code_folder.resolve())] if is_code(plan.stream) and plan.code_folder is not None else []

    def start(cell: Cell) -> None:
        log = folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "manifold_cl.study.worker", str(folder), cell.name, *code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",  # a worker may print anything
                env={**os.environ, "OMP_NUM_THREADS": str(plan.threads)},
                start_new_session=True,  # Ctrl-C goes to the supervisor only
            )
        running.append(process)
        threading.Thread(target=_listen, args=(process, cell, log, events), daemon=True).start()

    try:
        yield start
    finally:
        for process in running:
            process.kill()  # does nothing after its end
        for process in running:
            process.wait()


def _listen(process: subprocess.Popen[str], cell: Cell, log: Path, events: queue.SimpleQueue[Event]) -> None:
    """Turn a worker's messages into events, until it ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    events.put(Event(cell, "started"))
    reason = ""
    try:
        for line in process.stdout:
            match _parsed(line):
                case {
                    "progress": {
                        "task": str(task), "index": int(index), "tasks": int(tasks),
                        "phase": str(phase), "step": int(step), "steps": int(steps),
                    }
                }:  # fmt: skip
                    events.put(Event(cell, "progress", task, index, tasks, phase, step, steps))
                case {"note": str(note)}:
                    events.put(Event(cell, "note", message=note))
                case {"error": str(error)}:
                    reason = error
    finally:  # even after an error here, since the study waits for an event of this cell
        process.stdout.close()
        code = process.wait()
        process.stdin.close()
        if code == 0:
            events.put(Event(cell, "done"))
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            events.put(Event(cell, "failed", message=reason or f"the process {how}: see {log}"))


def _parsed(line: str) -> Any:
    """The JSON in a line; None for the output of a stream or a library."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
