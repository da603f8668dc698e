"""The record of a run: configuration and results, in one JSON file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from manifold_cl.continual.environment import peak_memory_mb
from manifold_cl.continual.metrics import METRICS, general_delta
from manifold_cl.files import VERSION, FileError, file_errors, read_json, write_json
from manifold_cl.kinds import is_number

RECORD_FORMAT = "manifold_cl.record"
PHASES = ("prepare", "train", "finish", "evaluate")
"""Phases of a task, whose seconds a record adds up."""
ROWS = ("timings", "losses", "constraints", "capacity")
"""Tables with one row per learned task."""
NAMES: dict[type, str] = {str: "a word", list: "a list", dict: "an object"}
UNUSED = {"balanced": frozenset({"energy", "source", "statistics_at", "from_weights", "policy"})}
"""Method → options without effect that its older records list."""


@dataclass
class RunRecord:
    """Configuration and results of a run. The fields are those of ``record.json`` (docs/record-format.md)."""

    name: str
    method: str
    stream: str
    config: dict[str, Any]
    tasks: list[str]
    status: str = "running"
    primary: str = ""
    zero_shot: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, list[list[float]]] = field(default_factory=dict)
    general: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    timings: list[dict[str, float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    constraints: list[dict[str, float]] = field(default_factory=list)
    capacity: list[dict[str, float]] = field(default_factory=list)
    peak_memory_mb: float = 0.0
    stored: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    run: str = ""

    @property
    def identity(self) -> str:
        """The identifier in the files of the run: ``run``, or the starting time in older records."""
        return self.run or self.started

    def matrix(self, score: str | None = None) -> npt.NDArray[np.float64]:
        """The T × T accuracy matrix of ``score`` (the primary one by default), NaN where not evaluated yet."""
        size = len(self.tasks)
        matrix = np.full((size, size), np.nan)
        for i, row in enumerate(self.accuracy.get(score or self.primary, [])):
            matrix[i] = row
        return matrix

    @property
    def done(self) -> int:
        """Number of tasks learned and evaluated."""
        return len(self.accuracy.get(self.primary, []))

    @property
    def seconds(self) -> float:
        """Seconds of all phases of all tasks so far."""
        return sum(timing.get(phase, 0.0) for timing in self.timings for phase in PHASES)

    def add_row(self, scores: Sequence[Mapping[str, float]], general: Mapping[str, float] | None = None) -> None:
        """Append the scores of all tasks after one more task, and update the metrics.

        Args:
            scores: of each task.
            general: name of each task that is only evaluated → its score.

        Raises:
            ValueError: when the names of scores differ between tasks or stages.
        """
        names = scores[0].keys()
        if odd := [row for row in (*scores, self.accuracy or scores[0]) if row.keys() != names]:
            raise ValueError(f"not the same scores at every stage, got {', '.join(names)} and {list(odd[0])}")
        for name in names:
            self.accuracy.setdefault(name, []).append([float(s[name]) for s in scores])
        for name, value in (general or {}).items():
            self.general[name].append(float(value))
        self._update_metrics()

    def truncate(self, done: int) -> None:
        """Delete the results after the first ``done`` tasks."""
        for rows in (*self.accuracy.values(), *(getattr(self, key) for key in ROWS)):
            del rows[done:]
        for row in self.general.values():
            del row[done + 1 :]  # it begins with the pre-trained model's score
        self.status = "running"
        self._update_metrics()

    def _update_metrics(self) -> None:
        matrix = self.matrix()
        self.metrics = {name: figure(matrix) for name, figure in METRICS.items()}
        self.metrics["zero_shot"] = float(np.mean(self.zero_shot[self.primary]))
        if self.general:
            self.metrics["general_delta"] = general_delta(self.general, len(self.tasks))
        self.peak_memory_mb = max(self.peak_memory_mb, peak_memory_mb())  # over all processes of the run

    def save(self, folder: Path) -> None:
        """Write ``record.json`` atomically."""
        content = {"format": RECORD_FORMAT, "version": VERSION, **asdict(self)}
        content["accuracy"] = {score: self.matrix(score).tolist() for score in self.accuracy}
        content = _replace(content, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
        write_json(folder / "record.json", content)

    @classmethod
    def load(cls, folder: Path | str) -> RunRecord:
        """The record in a run folder.

        Raises:
            FileError: when the file is missing, damaged, or lacks a field.
        """
        path = Path(folder) / "record.json"
        content = read_json(path, expected=RECORD_FORMAT)
        required = {"name", "method", "stream", "config", "tasks"}
        if missing := sorted(required - content.keys()):
            raise FileError(f"{path} lacks {', '.join(missing)}: it was not written by a run")
        with file_errors(path):
            _validate_types(content)
            done = _validate_rows(content)
            names = {f.name for f in fields(cls)}
            record = cls(**{key: value for key, value in _nan_for_null(content).items() if key in names})
            # The file has rows of nulls for tasks that were not learned yet.
            record.accuracy = {score: rows[:done] for score, rows in record.accuracy.items()}
        return record


TYPES: dict[str, type] = {name: get_origin(hint) or hint for name, hint in get_type_hints(RunRecord).items()}
"""Field → its type in the file."""


def validate_numbers(key: str, value: Any, kind: type) -> None:
    """Raise TypeError for anything but a list, or an object, of numbers or nulls."""
    numbers = value.values() if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(n is None or is_number(n) for n in numbers):
        raise TypeError(f"{key} is {'an object' if kind is dict else 'a list'} of numbers, got {str(value)[:80]}")
    for number in numbers:
        float(number or 0)  # OverflowError for a whole number of hundreds of digits


def _validate_types(content: Mapping[str, Any]) -> None:
    for key, kind in TYPES.items():
        if kind is not float and key in content and not isinstance(content[key], kind):
            raise TypeError(f"{key} is {str(content[key])[:80]!r}, {NAMES[kind]} is needed")
    if not all(isinstance(task, str) for task in content["tasks"]):
        raise TypeError(f"tasks are names, got {content['tasks']}")
    if content.get("status", "running") not in ("running", "complete"):
        raise ValueError(f"status is running or complete, got {content['status']!r}")
    for key in ("metrics", "stored"):
        validate_numbers(key, content.get(key, {}), dict)
    for key, row in content.get("general", {}).items():
        validate_numbers(f"general of {key}", row, list)
    for key in ROWS:
        for row in content.get(key, []):
            validate_numbers(key, row, list if key == "losses" else dict)
    validate_numbers("peak_memory_mb", [content.get("peak_memory_mb")], list)


def _validate_rows(content: Mapping[str, Any]) -> int:
    """The number of learned tasks. Refuses tables with rows for different numbers of tasks."""
    count, scores = len(content["tasks"]), content.get("accuracy", {})
    for key, row in content.get("zero_shot", {}).items():
        validate_numbers(f"zero_shot of {key}", row, list)
        if len(row) != count:
            raise ValueError(f"zero_shot of {key} has {len(row)} scores for {count} tasks")
    for key, matrix in scores.items():
        if not isinstance(matrix, list) or len(matrix) != count:
            raise ValueError(f"accuracy of {key} is not a list of {count} rows, one per task")
        for row in matrix:
            validate_numbers(f"accuracy of {key}", row, list)
            if len(row) != count:
                raise ValueError(f"accuracy of {key} has a row of {len(row)} scores for {count} tasks")
    if scores and content.get("primary") not in scores:
        raise ValueError(f"the primary score {content.get('primary')!r} is not among {', '.join(scores)}")
    filled = [i + 1 for matrix in scores.values() for i, row in enumerate(matrix) if any(n is not None for n in row)]
    lengths = {key: len(content[key]) for key in ROWS if key in content}
    done = next(iter(lengths.values()), max(filled, default=0))
    if odd := [key for key, row in content.get("general", {}).items() if len(row) != done + 1]:
        raise ValueError(f"general of {odd[0]} has other than {done + 1} scores, for {done} tasks and the start")
    if len(set(lengths.values())) > 1 or max(filled, default=0) > done or done > count or (done and not scores):
        raise ValueError(f"its tables are of different numbers of tasks: {lengths}, accuracy {max(filled, default=0)}")
    for timing, losses in zip(content.get("timings", []), content.get("losses", []), strict=False):
        if timing.get("steps", len(losses)) != len(losses):
            raise ValueError(f"a task of {timing['steps']} steps has {len(losses)} losses")
    if content.get("status") == "complete" and done < count:
        raise ValueError(f"it is complete, but has {done} of {count} tasks")
    return done


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The entries in which two configurations differ, one line each: ``lr: 0.001 there, 0.0005 here``."""
    unused = UNUSED.get(new.get("method", ""), frozenset())
    return [
        f"{key}: {old.get(key, 'unset')!r} there, {new.get(key, 'unset')!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key in unused and key not in new)
    ]


def _nan_for_null(content: dict[str, Any]) -> dict[str, Any]:
    """NaN for nulls among the numbers of a record; configuration and machine keep their nulls."""
    for key in content.keys() & {"zero_shot", "accuracy", "general", "metrics", "constraints", "losses", "capacity"}:
        content[key] = _replace(content[key], lambda x: math.nan if x is None else x)
    return content


def _replace(value: Any, replacement: Callable[[Any], Any]) -> Any:
    """A copy of nested objects and lists with every other value replaced."""
    if isinstance(value, dict):
        return {key: _replace(item, replacement) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item, replacement) for item in value]
    return replacement(value)
