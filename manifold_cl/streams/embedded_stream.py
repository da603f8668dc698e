"""What builders of embedded streams share: sizes of the parts, the choice of tasks, and the origins in a record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from manifold_cl.plugins import unknown
from manifold_cl.streams.archives import Archive
from manifold_cl.streams.selection import SEED, Evaluated, validate_selection


@dataclass(frozen=True)
class EmbeddedStream:
    """The name of a stream with its own data and model, its tasks in order, and the sizes of their parts."""

    name: str
    task_names: tuple[str, ...]
    train: int
    validation: int
    test: int

    def choose(
        self, tasks: Sequence[str] | None, examples: int | None, evaluate_on: Evaluated
    ) -> tuple[tuple[str, ...], int]:
        """The chosen tasks, and the number of training examples of each; ValueError for unknown ones and too many."""
        validate_selection(tasks, evaluate_on)
        chosen = self.task_names if tasks is None else tuple(tasks)
        for task in chosen:
            if task not in self.task_names:
                raise ValueError(f"stream {self.name!r}: {unknown('task', task, self.task_names)}")
        train = self.train if examples is None else examples
        if not 1 <= train <= self.train:
            raise ValueError(f"examples must be from 1 to {self.train} in stream {self.name!r}, got {examples}")
        return chosen, train

    def refuse(self, options: Iterable[str], *, instead: str = "") -> None:
        """Raise TypeError for options: none remain that the stream takes."""
        if names := ", ".join(options):
            raise TypeError(f"stream {self.name!r} has its own data and model and takes no {names}{instead}")

    def origins(self, archives: Iterable[Archive], train: int, evaluate_on: Evaluated) -> dict[str, Any]:
        """The provenance of a stream from these archives, in plain values."""
        return {
            "archives": [
                {"package": a.package, "version": a.version, "file": a.filename, "sha256": a.sha256} for a in archives
            ],
            "selection_seed": SEED,
            "train": train,
            "validation": self.validation,
            "test": self.test if evaluate_on == "test" else self.validation,
            "evaluate_on": evaluate_on,
        }
