"""One cell in a process of its own: ``python -m manifold_cl.study.worker FOLDER CELL [CODE_FOLDER]``.

Code that the study's stream names runs only where its folder is given.
What it tells the supervisor is JSON, a line each, on standard output. It ends when its standard input closes: a
supervisor that was killed leaves no worker behind that would write into the folder beside the next one's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from manifold_cl.continual import RunRecord
from manifold_cl.continual.runner import Progress
from manifold_cl.files import FileError
from manifold_cl.study.plan import Cell, StudyPlan

DIVERGED, REFUSED = 3, 4
"""Exit codes beside 0: the loss was not finite; input that cannot be."""
PATIENCE = 30.0
"""Seconds that a worker waits for its predecessor in the same cell to end."""

logger = logging.getLogger("manifold_cl")


def run_cell(
    plan: StudyPlan, cell: Cell, folder: Path, *, on_progress: Callable[[Progress], None] | None = None
) -> RunRecord:
    """The complete record of one cell, gone on with where an earlier process left it.

    A record that cannot be read is set aside, with a note, and the cell starts anew.
    """
    runner = plan.make_runner(cell, folder, on_progress=on_progress)
    place = runner.folder
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{place.name}.lock"), timeout=PATIENCE):  # a label may have a dot
        _set_aside_damaged(place)
        return runner.run(resume=True)


def _set_aside_damaged(place: Path) -> None:
    path = place / "record.json"
    if not path.exists():
        return
    try:
        RunRecord.load(place)
    except FileError as error:
        logger.warning("%s: set aside as record.damaged.json, the cell starts anew", error)
        path.replace(place / "record.damaged.json")


def main() -> None:
    """Run the cell that the command line names."""
    folder, name, *code_folders = sys.argv[1:]
    threading.Thread(target=_end_with_input, daemon=True).start()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logger.addHandler(_Notes(level=logging.WARNING))
    try:
        plan = StudyPlan.load(folder, code_folder=code_folders[0] if code_folders else None)
        torch.set_num_threads(plan.threads)
        run_cell(plan, plan.cell(name), Path(folder), on_progress=lambda state: _tell(progress=asdict(state)))
    except FloatingPointError as error:
        _tell(error=str(error))
        sys.exit(DIVERGED)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _tell(error=str(error))
        sys.exit(REFUSED)


class _Notes(logging.Handler):
    """Warnings, told to the supervisor."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell one."""
        _tell(note=record.getMessage())


def _tell(**content: Any) -> None:
    print(json.dumps(content), flush=True)


def _end_with_input() -> None:
    while os.read(0, 1 << 10):  # not sys.stdin: its lock, held by a thread, aborts an interpreter that ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
