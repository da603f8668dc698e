"""Progress bars for the phases of a run that the ``Trainer`` shows no bar for."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.runner import Progress


class PhaseBars:
    """Shows one bar per phase of a task, with the time left; training has the Trainer's own bar."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: tuple[Any, ...] = ()

    def __call__(self, progress: Progress) -> None:
        """Show a report of the run."""
        if not Ranks.current().writes:
            return
        key = (progress.index, progress.phase, progress.passes)
        if key != self._shown:
            self._close()
            self._shown = key
            if progress.phase != "train":
                name = f"{progress.index + 1}/{progress.tasks} {progress.task}: {progress.phase}"
                self._bar = tqdm(total=progress.steps or None, desc=name, leave=False)
        if self._bar is not None:
            self._bar.update(progress.step - self._bar.n)
            if progress.phase == "evaluate" and progress.step + 1 >= progress.steps:
                self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
