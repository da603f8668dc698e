"""The progress of many cells at a time: bars on a terminal, one line per minute in a file or pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from manifold_cl.cli.durations import in_words
from manifold_cl.cli.progress import PHASES, a_line_per_interval
from manifold_cl.cli.screen import bars, screen

if TYPE_CHECKING:
    from manifold_cl.study import Event, StudyPlan

ENOUGH = 0.05
"""Share of one cell below which the time left is unknown."""
NAMED = 4
"""Running cells that a line names."""


class CellClock:
    """How much of the cells is done, and the time left if they go on at the same rate.

    Args:
        total: number of cells.
        done: of them, complete before.
        now: a clock in seconds.
    """

    def __init__(self, total: int, done: int, now: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, done
        self._now, self._since = now, now()
        self._before = float(done)
        self._shares: dict[str, float] = {}
        self._words: dict[str, str] = {}

    def update(self, event: Event) -> None:
        """Apply an event to the state of its cell."""
        name = event.cell.name
        if event.ends:
            share = self._shares.pop(name, 0.0)
            self._words.pop(name, None)
            self.done += 1
            if event.kind == "failed":
                self._before += 1 - share  # the rest of the cell took no time
        elif event.kind == "started":
            self._words[name] = note_of(event)
        elif event.kind == "progress":
            share = share_of(event)
            if name not in self._shares:
                self._before += share  # done by an earlier call, which took no time of this one
            self._shares[name] = max(share, self.share(name))  # a pass for statistics is within another phase
            self._words[name] = note_of(event)

    def share(self, name: str) -> float:
        """The share of a running cell that is done."""
        return self._shares.get(name, 0.0)

    def seconds_left(self) -> float | None:
        """Estimated seconds; None if unknown so far."""
        reached = self.done + sum(self._shares.values())
        worked = reached - self._before
        return None if worked < ENOUGH else (self._now() - self._since) * (self.total - reached) / worked

    def left(self) -> str:
        """The time left in words; empty if unknown."""
        seconds = self.seconds_left()
        return "" if seconds is None else f"about {in_words(seconds)} left"

    def line(self) -> str:
        """The state in one line."""
        running = [f"{name}: {words}" for name, words in list(self._words.items())]  # lines come from a thread
        if len(running) > NAMED:
            running[NAMED:] = [f"{len(running) - NAMED} more"]
        return "; ".join(part for part in (f"{self.done} of {self.total} done", self.left(), *running) if part)


def share_of(event: Event) -> float:
    """The share of a cell that is done at an event of its progress."""
    if not event.tasks:
        return 0.0
    start, length = PHASES.get(event.phase, (0.0, 0.0))
    within = start + length * (event.step / event.steps if event.steps else 0.0)
    return min(1.0, (event.task + within) / event.tasks)


def note_of(event: Event) -> str:
    """The present work of a running cell, in words."""
    if event.kind == "started":
        return f"starting on {event.message}" if event.message else "starting"
    if event.phase == "zero-shot":
        return "evaluate before training"
    step = f" {event.step}/{event.steps}" if event.steps else ""
    return f"task {event.task + 1} of {event.tasks}, {event.message}, {event.phase}{step}"


@contextmanager
def show_cells(plan: StudyPlan, done: int) -> Iterator[Callable[[Event], None]]:
    """A display of events: a bar for all cells and a line per running one, else a line per minute and finished cell."""
    clock = CellClock(len(plan.cells), done)
    with bars(counted=True) as progress, a_line_per_interval(clock.line):
        total = progress.add_task(plan.name, total=len(plan.cells), completed=done, note="", left="")
        lines = {}

        def show(event: Event) -> None:
            name = event.cell.name
            clock.update(event)
            if event.kind in ("started", "progress"):
                if name not in lines:  # the message of a start can be lost
                    lines[name] = progress.add_task(name, total=None, note="", left="")
                done_tasks = event.tasks * clock.share(name)
                progress.update(lines[name], total=event.tasks or None, completed=done_tasks, note=note_of(event))
                progress.update(total, left=clock.left())
            elif event.kind == "note":
                screen.say((f"{name}: {event.message}", "yellow"))
            elif event.ends:
                if name in lines:  # a cell can fail before its process starts
                    progress.remove_task(lines.pop(name))
                progress.update(total, advance=1, left=clock.left())
                text = f"{event.kind}: {name}{f': {event.message}' if event.message else ''}"
                screen.say((text, "dim" if event.kind == "done" else "red"))

        yield show
