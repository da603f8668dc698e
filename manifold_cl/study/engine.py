"""Engines: the protocol of what runs the cells of a study, and the engine of one machine."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from manifold_cl.plugins import unknown
from manifold_cl.study.estimate import Costs, measure_costs
from manifold_cl.study.events import Event
from manifold_cl.study.plan import Cell, StudyPlan
from manifold_cl.study.processes import workers

ENGINES = ("local", "ray")


class Engine(AbstractContextManager["Engine"], Protocol):
    """Runs cells, each in a process of its own; a context that holds what they need, such as a connection."""

    name: str

    def validate(self, plan: StudyPlan) -> None:
        """Raise ValueError for a plan whose cells cannot run here. Nothing is written into the study's folder."""

    def slots(self, plan: StudyPlan) -> int:
        """The number of cells that run at a time."""

    def measure(self, plan: StudyPlan, labels: Sequence[str], on_label: Callable[[str], None]) -> Costs:
        """`measure_costs`, where the cells run."""

    def run(self, plan: StudyPlan, folder: Path, cells: Sequence[Cell]) -> Generator[Event, None, None]:
        """Run the cells, and yield their events; the last one of a cell is ``done`` or ``failed``.

        The results are in ``folder``, which holds ``study.json``, when a cell is done. Closing the generator ends all
        cells that run.
        """


class LocalEngine:
    """Runs cells in processes of this machine, `StudyPlan.processes` at a time."""

    name = "local"

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        return None

    def validate(self, plan: StudyPlan) -> None:
        """Accept every plan."""

    def slots(self, plan: StudyPlan) -> int:
        """The number of processes."""
        return plan.processes

    def measure(self, plan: StudyPlan, labels: Sequence[str], on_label: Callable[[str], None]) -> Costs:
        """`measure_costs` in this process."""
        return measure_costs(plan, labels, on_label)

    def run(self, plan: StudyPlan, folder: Path, cells: Sequence[Cell]) -> Generator[Event, None, None]:
        """Run the cells; see `Engine.run`."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        waiting, running = list(cells), 0
        with workers(plan, folder, events) as start:
            while waiting or running:
                while waiting and running < plan.processes:
                    start(waiting.pop(0))
                    running += 1
                event = events.get()
                running -= event.ends
                yield event


def make_engine(name: str, *, address: str | None = None) -> Engine:
    """The engine of that name.

    Args:
        name: ``local``, or ``ray``, which needs the extra of that name.
        address: of a running Ray cluster, for ``ray``; by default Ray's variable ``RAY_ADDRESS``, and without it a Ray
            of this machine alone.

    Raises:
        ValueError: an unknown name, or an address for ``local``.
    """
    if name not in ENGINES:
        raise ValueError(unknown("engine", name, ENGINES))
    if name == "ray":
        from manifold_cl.study.ray_engine import RayEngine

        return RayEngine(address)
    if address is not None:
        raise ValueError(f"address={address} is for engine=ray, and the engine is local: choose ray, or drop it")
    return LocalEngine()
