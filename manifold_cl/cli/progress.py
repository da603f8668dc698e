"""The progress of several runs: a bar with the time left on a terminal, one line per minute in a file or pipe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from manifold_cl.cli.durations import in_words
from manifold_cl.cli.screen import bars, screen

if TYPE_CHECKING:
    from manifold_cl.continual.runner import Progress

INTERVAL = 60.0
"""Seconds between two lines where there is no terminal."""
PHASES = {
    "zero-shot": (0.0, 0.0),
    "prepare": (0.0, 0.1),
    "train": (0.1, 0.7),
    "finish": (0.8, 0.05),
    "evaluate": (0.85, 0.15),
}
"""Phase of a task → the share of the task that is done when it begins, and that it takes in steps. Passes for
statistics are steps of the phase that they are in."""
EARLY = 0.05
"""Share of the work below which the time so far says too little about the time left."""


class RunClock:
    """The share of the runs that is done, and the time left.

    Args:
        weights: label of a run → its expected seconds, or any numbers with the same ratios.
        expected: seconds of all runs together, if known; used while less than `EARLY` is done.
        now: a clock in seconds.
    """

    def __init__(
        self, weights: Mapping[str, float], expected: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        total = sum(weights.values())
        self._shares = {label: weight / total for label, weight in weights.items()}
        self._expected, self._now = expected, now
        self._start, self._trains_since = now(), cast("float | None", None)
        self._finished, self._resumed, self.done = 0.0, 0.0, 0.0
        self._label, self._state, self._began = "", cast("Progress | None", None), False
        self._phase = "prepare"

    def update(self, label: str, state: Progress) -> None:
        """Take over the state of the run ``label``."""
        self._state = state
        if state.phase == "zero-shot":
            self._label = label
            return
        if self._trains_since is None:  # neither loading nor the first evaluation counts
            self._trains_since = self._now()
        if state.phase != "statistics":
            self._phase = state.phase
        start, length = PHASES[self._phase]
        within = start + length * (state.step / state.steps if state.steps else 0.0)
        share = self._shares[label] * (state.index + within) / state.tasks
        if not self._began or label != self._label:
            self._resumed += share  # done by an earlier call, which took no time of this one
        same = self._began and label == self._label
        self._label, self._began = label, True
        # a further pass for statistics begins again at its first batch
        self.done = max(self.done, self._finished + share) if same else self._finished + share

    def finish(self, label: str) -> None:
        """The run ``label`` is complete."""
        if not self._began:
            self._resumed += self._shares[label]
        self._finished += self._shares[label]
        self.done, self._began = self._finished, False

    def seconds_left(self) -> float | None:
        """Estimated seconds; None if unknown so far."""
        worked = self.done - self._resumed
        if worked >= EARLY and self._trains_since is not None:
            return (self._now() - self._trains_since) * (1 - self.done) / worked
        if self._expected is None:
            return None
        left = self._expected - (self._now() - self._start)
        return left if left > 0 else None

    def line(self) -> str:
        """The state in one line."""
        left = self.seconds_left()
        ending = "" if left is None else f"; about {in_words(left)} left"
        return f"{describe(self._label, self._state)}{ending}"


def describe(label: str, state: Progress | None) -> str:
    """The run, its task and the phase.

    >>> describe("eblora", None)
    'starting'
    """
    if state is None:
        return "starting"
    if state.phase == "zero-shot":
        return f"{label}: {note(state)}"
    return f"{label}: task {state.index + 1} of {state.tasks}, {state.task}, {note(state)}"


def note(state: Progress) -> str:
    """The phase with its step and loss, or with the time left of a pass for statistics."""
    words = {"zero-shot": "evaluate before training"}.get(state.phase, state.phase)
    if state.phase == "statistics":
        left = f", {in_words(state.seconds_left)} to the end of the pass" if state.seconds_left > 0 else ""
        return f"{words}, pass {state.passes}: batch {state.step} of {state.steps}{left}"
    count = f" {state.step}/{state.steps}" if state.steps else ""
    loss = f", loss {state.loss:.3f}" if state.phase == "train" and state.step else ""
    return f"{words}{count}{loss}"


class RunDisplay:
    """Shows the state of runs; see `show_runs`."""

    def __init__(self, clock: RunClock, update: Callable[..., None]) -> None:
        self._clock, self._update = clock, update

    def on_progress(self, label: str) -> Callable[[Progress], None]:
        """The callback of the run ``label``."""

        def show(state: Progress) -> None:
            self._clock.update(label, state)
            title = label if state.phase == "zero-shot" else f"{label} {state.index + 1}/{state.tasks} {state.task}"
            self._update(description=title, completed=self._clock.done, left=self._left(), note=note(state))

        return show

    def finish(self, label: str) -> None:
        """The run ``label`` is complete."""
        self._clock.finish(label)
        self._update(description=label, completed=self._clock.done, left=self._left(), note="complete")

    def _left(self) -> str:
        left = self._clock.seconds_left()
        return "" if left is None else f"about {in_words(left)} left"


@contextmanager
def show_runs(weights: Mapping[str, float], expected: float | None = None) -> Iterator[RunDisplay]:
    """A display of runs: one bar for all of them on a terminal, else one line per `INTERVAL`."""
    clock = RunClock(weights, expected)
    with bars() as progress:
        bar = progress.add_task("starting", total=1.0, note="", left="")
        display = RunDisplay(clock, lambda **fields: progress.update(bar, **fields))
        with a_line_per_interval(clock.line):
            yield display


@contextmanager
def a_line_per_interval(line: Callable[[], str]) -> Iterator[None]:
    """Where there is no terminal, print a line per `INTERVAL` from a thread, since one phase can take long."""
    if screen.is_terminal:
        yield
        return
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(INTERVAL):
            screen.say((line(), "dim"))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
