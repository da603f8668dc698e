"""Studies: a plan, the folder of its results, and the calls that run and resume its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from manifold_cl.continual import RunRecord
from manifold_cl.continual.record import config_differences
from manifold_cl.files import FileError
from manifold_cl.lists import listed
from manifold_cl.study.engine import Engine, LocalEngine
from manifold_cl.study.events import CellFailure, Event
from manifold_cl.study.plan import Cell, StudyPlan


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
                raise FileError(
                    f"{self.folder} holds a study of another configuration{hint}: {listed(changes, 6, separator='; ')}"
                )
        others = [
            f"cells/{cell.name} ({', '.join(changes)})"
            for cell, record in self.records().items()
            if (changes := config_differences(record.config, self.plan.make_runner(cell, self.folder).config))
        ]
        if others:
            raise FileError(
                f"{self.folder} holds runs of another configuration: {listed(others, separator='; ')}: delete those "
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

    def run(
        self,
        *,
        extend: bool = False,
        engine: Engine | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> list[CellFailure]:
        """Run all cells that are not complete, and return the failures.

        After an interruption, the same call resumes each cell from its last finished task, to the same numbers.

        Args:
            extend: allows further methods, seeds and orders, as in `validate`.
            engine: runs the cells, within its context; by default `LocalEngine`.
            on_event: called with every event of a cell.

        Raises:
            FileError: the folder holds another study, or another process is running this one.
            ValueError: the engine cannot run the cells (`Engine.validate`).
        """
        engine = engine or LocalEngine()
        if self.pending():
            engine.validate(self.plan)
        with locked(self.folder):
            self.validate(extend=extend)
            self.plan.save(self.folder)
            return self._run(self.pending(), engine, on_event)

    def _run(self, cells: Sequence[Cell], engine: Engine, on_event: Callable[[Event], None]) -> list[CellFailure]:
        failures = []
        with closing(engine.run(self.plan, self.folder, cells)) as events:
            for event in events:
                on_event(event)
                if event.kind == "failed":
                    failures.append(CellFailure(event.cell, event.message))
        return failures


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which no other study runs in the folder, which is made; FileError when one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "study.lock", timeout=0).acquire()
    except Timeout:
        raise FileError(f"another process is at work on {folder}: wait for it, or stop it") from None
    with lock:
        yield
