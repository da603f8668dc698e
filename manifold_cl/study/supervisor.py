"""Runs the cells of a study, several processes at a time, and goes on where an earlier call was stopped."""

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
from manifold_cl.study.plan import Cell, StudyPlan, is_code


@dataclass(frozen=True)
class Event:
    """Something that happened to a cell: what a progress display needs."""

    cell: Cell
    kind: Literal["started", "progress", "note", "done", "failed"]
    said: str = ""
    task: int = 0
    tasks: int = 0
    phase: str = ""
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class CellFailure:
    """A cell that did not come to its end, and why."""

    cell: Cell
    reason: str


class Study:
    """A plan and the folder of its results.

    Args:
        plan: what to run.
        folder: ``study.json``, a run folder for each cell under ``cells/`` and its log under ``logs/``.
    """

    def __init__(self, plan: StudyPlan, folder: Path | str) -> None:
        self.plan = plan
        self.folder = Path(folder)

    def check(self, *, extend: bool = False) -> None:
        """Refuse a folder of other numbers than the plan's: its ``study.json``, and every record in it.

        Args:
            extend: let the plan have further methods, seeds and orders.

        Raises:
            FileError: listing the differences; nothing is written.
        """
        if (self.folder / "study.json").exists():
            old = StudyPlan.load(self.folder)
            if (differing := old.changes(self.plan)) and not (extend and self.plan.extends(old)):
                hint = "" if not self.plan.extends(old) else " (--extend adds cells to it)"
                raise FileError(f"{self.folder} holds a study of another configuration{hint}: {'; '.join(differing)}")
        if wrong := list(self._other_runs()):
            rest = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise FileError(
                f"{self.folder} holds runs of another configuration: {'; '.join(wrong[:3])}{rest}: delete those "
                "folders to run the cells again, or choose another folder"
            )

    def _other_runs(self) -> Iterator[str]:
        """Cells whose records are of another configuration, in full, than the plan would run; a line each."""
        for cell, record in self.records().items():
            if differing := config_differences(record.config, self.plan.make_runner(cell, self.folder).config):
                yield f"cells/{cell.name} ({', '.join(differing)})"

    def records(self) -> dict[Cell, RunRecord]:
        """Records of the cells that have one that can be read, complete or not."""
        found = {}
        for cell in self.plan.cells:
            with suppress(FileError):
                found[cell] = RunRecord.load(self.folder / "cells" / cell.name)
        return found

    def pending(self) -> list[Cell]:
        """The cells that are not complete, those that were begun first."""
        records = self.records()
        left = [cell for cell in self.plan.cells if cell not in records or records[cell].status != "complete"]
        return sorted(left, key=lambda cell: cell not in records)

    def run(self, *, extend: bool = False, on_event: Callable[[Event], None] = lambda event: None) -> list[CellFailure]:
        """Run all cells that are not complete; the failures, if any, after all others were run.

        Killed at any moment, the same call goes on from each cell's last finished task, to the same numbers.

        Raises:
            FileError: the folder holds another study, or another process is at work on this one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / "study.lock", timeout=0).acquire()
        except Timeout:
            raise FileError(f"another process is at work on {self.folder}: wait for it, or stop it") from None
        with lock:
            self.check(extend=extend)
            self.plan.save(self.folder)
            return self._run(self.pending(), on_event)

    def _run(self, waiting: Sequence[Cell], on_event: Callable[[Event], None]) -> list[CellFailure]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        waiting, failures, ended = list(waiting), [], 0
        with _workers() as start:
            for cell in waiting[: self.plan.processes]:
                start(self.plan, self.folder, cell, events)
            following = waiting[self.plan.processes :]
            while ended < len(waiting):
                event = events.get()
                on_event(event)
                if event.kind not in ("done", "failed"):
                    continue
                ended += 1
                if event.kind == "failed":
                    failures.append(CellFailure(event.cell, event.said))
                if following:
                    start(self.plan, self.folder, following.pop(0), events)
        return failures


def _code(plan: StudyPlan) -> list[str]:
    """The arguments that let a worker run the stream's own code, where this plan may."""
    return [str(plan.code_folder.resolve())] if is_code(plan.stream) and plan.code_folder is not None else []


@contextmanager
def _workers() -> Iterator[Callable[[StudyPlan, Path, Cell, queue.SimpleQueue[Event]], None]]:
    """Starts workers, and ends those that still run when it is left."""
    running: list[subprocess.Popen[str]] = []

    def start(plan: StudyPlan, folder: Path, cell: Cell, events: queue.SimpleQueue[Event]) -> None:
        log = folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "manifold_cl.study.worker", str(folder), cell.name, *_code(plan)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",  # anything may be printed in a worker
                env={**os.environ, "OMP_NUM_THREADS": str(plan.threads)},
                start_new_session=True,  # Ctrl-C is the supervisor's to hear
            )
        running.append(process)
        threading.Thread(target=_listen, args=(process, cell, log, events), daemon=True).start()

    try:
        yield start
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
        for process in running:
            process.wait()


def _listen(process: subprocess.Popen[str], cell: Cell, log: Path, events: queue.SimpleQueue[Event]) -> None:
    """Turn what a worker says into events, until it ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    events.put(Event(cell, "started"))
    reason = ""
    try:
        for line in process.stdout:
            match _message(line):
                case {
                    "progress": {
                        "task": str(task), "index": int(index), "tasks": int(tasks),
                        "phase": str(phase), "step": int(step), "steps": int(steps),
                    }
                }:  # fmt: skip
                    events.put(Event(cell, "progress", task, index, tasks, phase, step, steps))
                case {"note": str(note)}:
                    events.put(Event(cell, "note", said=note))
                case {"error": str(error)}:
                    reason = error
    finally:  # whatever happens here, the study does not wait for this cell for ever
        process.stdout.close()
        code = process.wait()
        process.stdin.close()
        if code == 0:
            events.put(Event(cell, "done"))
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            events.put(Event(cell, "failed", said=reason or f"the process {how}: see {log}"))


def _message(line: str) -> Any:
    """The JSON in a line; None for what a stream or a library printed."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
