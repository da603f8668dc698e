"""Worker process of one cell: ``python -m manifold_cl.study.worker FOLDER CELL [CODE_FOLDER]``.

Code that the study's stream names runs only with ``CODE_FOLDER``. Messages to the supervisor are lines of JSON on
standard output. The worker ends when its standard input closes, so that no worker outlives a killed supervisor.
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
"""Exit codes beside 0: the loss was not finite; the input was invalid."""
PATIENCE = 30.0
"""Seconds to wait for an earlier worker of the same cell."""

logger = logging.getLogger("manifold_cl")


def run_cell(
    plan: StudyPlan, cell: Cell, folder: Path, *, on_progress: Callable[[Progress], None] | None = None
) -> RunRecord:
    """The complete record of one cell, resumed from the last finished task.

    A record that cannot be read is renamed to ``record.damaged.json``, with a note, and the cell starts again.
    """
    runner = plan.make_runner(cell, folder, on_progress=on_progress)
    runner.folder.mkdir(parents=True, exist_ok=True)
    lock = runner.folder.with_name(f"{runner.folder.name}.lock")  # a label may have a dot
    with FileLock(lock, timeout=PATIENCE):
        path = runner.folder / "record.json"
        try:
            if path.exists():
                RunRecord.load(runner.folder)
        except FileError as error:
            logger.warning("%s: set aside as record.damaged.json, the cell starts anew", error)
            path.replace(path.with_name("record.damaged.json"))
        return runner.run(resume=True)


def main() -> None:
    """Run the cell that the command line names."""
    folder, name, *code_folders = sys.argv[1:]
    threading.Thread(target=_end_with_input, daemon=True).start()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logger.addHandler(_Warnings(level=logging.WARNING))
    try:
        plan = StudyPlan.load(folder, code_folder=code_folders[0] if code_folders else None)
        torch.set_num_threads(plan.threads)
        run_cell(plan, plan.cell(name), Path(folder), on_progress=lambda state: _send(progress=asdict(state)))
    except (FloatingPointError, ValueError, TypeError, OSError, ImportError) as error:
        _send(error=str(error))
        sys.exit(DIVERGED if isinstance(error, FloatingPointError) else REFUSED)


class _Warnings(logging.Handler):
    """Sends warnings to the supervisor."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        _send(note=record.getMessage())


def _send(**content: Any) -> None:
    print(json.dumps(content), flush=True)


def _end_with_input() -> None:
    while os.read(0, 1 << 10):  # not sys.stdin: an interpreter aborts at its end if a thread holds that lock
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
