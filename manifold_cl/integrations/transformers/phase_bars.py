"""Progress bars for the parts of a run outside of the ``Trainer``."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.runner import Progress


class PhaseBars:
    """Shows one bar per evaluation and per pass for statistics, with the time left. The Trainer has its own bar."""

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
            if progress.phase != "train" and progress.steps:
                name = f"{progress.index + 1}/{progress.tasks} {progress.task}: {progress.phase}"
                self._bar = tqdm(total=progress.steps, desc=name, leave=False)
        if self._bar is not None:
            self._bar.update(progress.step - self._bar.n)
            if progress.step >= progress.steps:  # before the Trainer shows its own
                self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
