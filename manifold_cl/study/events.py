"""Events in the cells of a study, and cells that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manifold_cl.study.plan import Cell


@dataclass(frozen=True)
class Event:
    """An event in a cell, for progress displays.

    The message of a start on a cluster is the name of the node, that of progress the task, that of a note or a failure
    a sentence.
    """

    cell: Cell
    kind: Literal["started", "progress", "note", "done", "failed"]
    message: str = ""
    task: int = 0
    tasks: int = 0
    phase: str = ""
    step: int = 0
    steps: int = 0

    @property
    def ends(self) -> bool:
        """Whether it is the last event of its cell."""
        return self.kind in ("done", "failed")


@dataclass(frozen=True)
class CellFailure:
    """A cell that did not finish, with the reason."""

    cell: Cell
    reason: str
