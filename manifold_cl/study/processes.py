"""Worker processes of cells, and their messages as events."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manifold_cl.streams.registry import is_code
from manifold_cl.study.events import Event
from manifold_cl.study.plan import Cell, StudyPlan


@contextmanager
def workers(plan: StudyPlan, folder: Path, events: queue.SimpleQueue[Event]) -> Iterator[Callable[[Cell], None]]:
    """A function that starts the worker of a cell; workers still running at the end are killed.

    Args:
        plan: of the study.
        folder: of the study, with ``study.json``.
        events: receives those of every cell, the last of kind ``done`` or ``failed``.
    """
    running: list[subprocess.Popen[str]] = []
    code = [str(plan.code_folder.resolve())] if is_code(plan.stream) and plan.code_folder is not None else []

    def start(cell: Cell) -> None:
        log = log_of(folder, cell)
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


def log_of(folder: Path, cell: Cell) -> Path:
    """The file with the output of a cell's worker."""
    return folder / "logs" / f"{cell.name}.log"


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
