"""The record of a run: what was run and what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.formats.files import read_json
from analysis.formats.own import check_format

Array = NDArray[np.float64]
AT_ONCE = "joint"
"""The method that learns all tasks in place of the first."""
BOUNDS = ("zero_shot", AT_ONCE)
"""Methods that no sequence of tasks competes with: nothing learned, and everything at once."""


_KINDS: tuple[tuple[str, type, str], ...] = (
    ("tasks", list, "a list"),
    *((key, dict, "an object") for key in ("zero_shot", "accuracy")),
    *((key, str, "text") for key in ("name", "method", "stream", "status", "primary", "started", "finished")),
    *((key, list, "a list") for key in ("timings", "losses", "constraints", "capacity")),
    *((key, dict, "an object") for key in ("metrics", "config", "stored", "versions", "machine", "provenance")),
)
_OPTIONAL = {
    *("started", "finished", "timings", "losses", "constraints", "capacity"),
    *("metrics", "config", "stored", "versions", "machine", "provenance"),
}


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
    """Bytes of all ``updates``, of the ``state`` carried between tasks, and ``old_examples``; older records lack it."""
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
        file = Path(path)
        file = file / "record.json" if file.is_dir() else file
        data = read_json(file)
        check_format(file, data, "manifold_cl.record")
        for key in ("name", "method", "stream", "status", "tasks", "zero_shot", "accuracy", "primary"):
            if key not in data:
                raise ValueError(f"{file}: key {key!r} is missing")
        for key, kind, called in _KINDS:
            value = data.get(key)
            if not isinstance(value, kind) and not (key in _OPTIONAL and value is None):
                found = "null" if value is None else f"a {type(value).__name__}"
                raise ValueError(f"{file}: key {key!r} is {found}, {called} was expected (docs/record-format.md)")
        if not all(isinstance(task, str) for task in data["tasks"]) or len(set(data["tasks"])) < len(data["tasks"]):
            raise ValueError(f"{file}: key 'tasks' is {data['tasks']!r:.200}, different names were expected")
        try:
            zero_shot = {score: _array(values) for score, values in data["zero_shot"].items()}
            tasks = tuple(data["tasks"])
            begun = dict.fromkeys(zero_shot, np.full((len(tasks), len(tasks)), np.nan))  # nothing learned so far
            record = cls(
                folder=file.parent,
                name=str(data["name"]),
                method=str(data["method"]),
                stream=str(data["stream"]),
                status=str(data["status"]),
                tasks=tasks,
                zero_shot=zero_shot,
                accuracy=begun | {score: _array(values) for score, values in data["accuracy"].items()},
                primary=str(data["primary"]),
                metrics=_numbers(data.get("metrics")),
                config=dict(data.get("config") or {}),
                timings=_rows(data.get("timings")),
                losses=tuple(_array(values) for values in data.get("losses") or ()),
                constraints=_rows(data.get("constraints")),
                capacity=_rows(data.get("capacity")),
                peak_memory_mb=_number(data.get("peak_memory_mb")),
                stored=None if data.get("stored") is None else _numbers(data["stored"]),
                versions=data.get("versions"),
                machine=data.get("machine"),
                provenance=data.get("provenance"),
                started=data.get("started"),
                finished=data.get("finished"),
            )
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
                raise ValueError(
                    f"{file}: accuracy {score!r} has shape {matrix.shape}, {count} tasks need {(count, count)}"
                )
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
        """The metrics that mean something for the method: joint training leaves no task unseen to transfer to."""
        return {
            key: value for key, value in self.metrics.items() if self.method != AT_ONCE or not key.startswith("fwt")
        }

    @property
    def learning_time(self) -> float:
        """Seconds spent on preparing, training and finishing all tasks, evaluation left out; NaN if unknown."""
        return self.seconds("prepare", "train", "finish")

    def seconds(self, *phases: str) -> float:
        """Seconds of these phases over all tasks, NaN if unknown; a phase that a method does not have takes none."""
        if not self.timings:
            return float("nan")
        return float(sum(row.get(phase, 0.0) for row in self.timings for phase in phases))


def label_records(records: Record | Sequence[Record]) -> dict[str, Record]:
    """Runs by method, or by name where a method occurs twice."""
    runs = [records] if isinstance(records, Record) else list(records)
    methods = [run.method for run in runs]
    labels = methods if len(set(methods)) == len(methods) else [run.name for run in runs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"runs share their names, label them with a mapping: {', '.join(labels)}")
    return dict(zip(labels, runs, strict=True))


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise ValueError(f"{value!r} is no number")
    return float("nan") if value is None else float(value)


def _array(values: Sequence[Any]) -> Array:
    return np.array(values, dtype=np.float64)


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    return {key: _number(value) for key, value in (values or {}).items()}


def _rows(rows: Sequence[Mapping[str, Any] | None] | None) -> tuple[Mapping[str, float], ...]:
    return tuple(_numbers(row) for row in rows or ())
