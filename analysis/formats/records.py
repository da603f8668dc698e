"""Records of runs: configuration, scores, times and costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.formats.files import value_of
from analysis.formats.own import read_format

Array = NDArray[np.float64]
AT_ONCE = "joint"
"""The method that learns all tasks in place of the first."""
BOUNDS = ("zero_shot", AT_ONCE)
"""Reference methods that no sequence of tasks competes with: nothing learned, and everything at once."""


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise ValueError(f"{value!r} is no number")
    return float("nan") if value is None else float(value)


def _array(values: Any) -> Array:
    entries = np.array(values, dtype=object)
    return np.array([_number(value) for value in entries.ravel()], dtype=np.float64).reshape(entries.shape)


def _arrays(values: Mapping[str, Any]) -> dict[str, Array]:
    return {score: _array(value) for score, value in values.items()}


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    return {key: _number(value) for key, value in (values or {}).items()}


def _rows(rows: Sequence[Mapping[str, Any] | None] | None) -> tuple[Mapping[str, float], ...]:
    return tuple(_numbers(row) for row in rows or ())


_NEEDED: Mapping[str, tuple[type, Callable[[Any], Any]]] = {
    **dict.fromkeys(("name", "method", "stream", "status", "primary"), (str, str)),
    "tasks": (list, tuple),
    "zero_shot": (dict, _arrays),
    "accuracy": (dict, _arrays),
}
_OPTIONAL: Mapping[str, tuple[type, Callable[[Any], Any]]] = {
    "metrics": (dict, _numbers),
    "config": (dict, lambda value: dict(value or {})),
    **dict.fromkeys(("timings", "constraints", "capacity"), (list, _rows)),
    "losses": (list, lambda rows: tuple(map(_array, rows or ()))),
    "stored": (dict, lambda value: None if value is None else _numbers(value)),
    **dict.fromkeys(("versions", "machine", "provenance"), (dict, lambda value: value)),
    **dict.fromkeys(("started", "finished"), (str, lambda value: value)),
}
"""Key to its kind in JSON and the function that reads it."""


@dataclass(frozen=True, eq=False)
class Record:
    """The contents of ``record.json``: scores in percent, times in seconds, NaN where a number is unknown.

    Row i of an accuracy matrix holds the scores of all T tasks after training task i + 1.
    """

    folder: Path
    name: str
    method: str
    stream: str
    status: str
    tasks: tuple[str, ...]
    zero_shot: Mapping[str, Array]
    accuracy: Mapping[str, Array]
    primary: str
    metrics: Mapping[str, float]
    config: Mapping[str, Any]
    timings: tuple[Mapping[str, float], ...] = ()
    losses: tuple[Array, ...] = ()
    constraints: tuple[Mapping[str, float], ...] = ()
    capacity: tuple[Mapping[str, float], ...] = ()
    peak_memory_mb: float = float("nan")
    stored: Mapping[str, float] | None = None
    """Bytes of ``updates`` and of the ``state`` carried between tasks, and ``old_examples``; None in old records."""
    versions: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    started: str | None = None
    finished: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """The record in a run folder, or in the ``record.json`` named directly.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, of another format or version, or contradicts itself.
        """
        file, data = read_format(path, "record.json", "manifold_cl.record")
        values = {key: value_of(file, data, key, kind) for key, (kind, _) in _NEEDED.items()}
        values |= {key: value_of(file, data, key, kind, null=True) for key, (kind, _) in _OPTIONAL.items()}
        tasks = values["tasks"]
        if not all(isinstance(task, str) for task in tasks) or len(set(tasks)) < len(tasks):
            raise ValueError(f"{file}: key 'tasks' is {tasks!r:.200}, different names were expected")
        try:
            fields = {key: read(values[key]) for key, (_, read) in {**_NEEDED, **_OPTIONAL}.items()}
            unknown = np.full((len(tasks), len(tasks)), np.nan)  # before the first task is learned
            fields["accuracy"] = dict.fromkeys(fields["zero_shot"], unknown) | fields["accuracy"]
            record = cls(folder=file.parent, peak_memory_mb=_number(data.get("peak_memory_mb")), **fields)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{file} does not follow docs/record-format.md: {error}") from error
        record._check(file)
        return record

    def _check(self, file: Path) -> None:
        count = len(self.tasks)
        if self.primary not in self.accuracy:
            raise ValueError(f"{file}: primary score {self.primary!r} is not among {sorted(self.accuracy)}")
        for score, matrix in self.accuracy.items():
            if matrix.shape != (count, count):
                shape = f"shape {matrix.shape}, {count} tasks need {(count, count)}"
                raise ValueError(f"{file}: accuracy {score!r} has {shape}")
        for score, row in self.zero_shot.items():
            if row.shape != (count,):
                raise ValueError(f"{file}: zero_shot {score!r} has shape {row.shape}, expected {(count,)}")

    @property
    def matrix(self) -> Array:
        """The (T, T) accuracy matrix of the primary score, percent."""
        return self.accuracy[self.primary]

    @property
    def baseline(self) -> Array:
        """The (T,) scores of the pre-trained model, percent; NaN where they were not measured."""
        return self.zero_shot.get(self.primary, np.full(len(self.tasks), np.nan))

    @property
    def merits(self) -> Mapping[str, float]:
        """The metrics, without forward transfer for joint training, which leaves no task unseen."""
        unseen = self.method != AT_ONCE
        return {key: value for key, value in self.metrics.items() if unseen or not key.startswith("fwt")}

    @property
    def learning_time(self) -> float:
        """Seconds of preparing, training and finishing all tasks, without evaluation; NaN if unknown."""
        return self.seconds("prepare", "train", "finish")

    def seconds(self, *phases: str) -> float:
        """Seconds of these phases over all tasks, NaN if unknown; a phase that a method lacks takes none."""
        if not self.timings:
            return float("nan")
        return float(sum(row.get(phase, 0.0) for row in self.timings for phase in phases))


def label_records(records: Record | Sequence[Record]) -> dict[str, Record]:
    """Runs by method, or by name if a method occurs twice."""
    runs = [records] if isinstance(records, Record) else list(records)
    methods = [run.method for run in runs]
    labels = methods if len(set(methods)) == len(methods) else [run.name for run in runs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"runs share their names, label them with a mapping: {', '.join(labels)}")
    return dict(zip(labels, runs, strict=True))
