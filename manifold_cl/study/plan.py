"""Plans of studies: methods, cells, and the file ``study.json`` beside the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from manifold_cl.continual import METHODS, ContinualRunner, Method, TaskStream, Training, make_method
from manifold_cl.continual.record import config_differences
from manifold_cl.continual.runner import Progress
from manifold_cl.continual.validation import validate_name
from manifold_cl.files import VERSION, FileError, read_json, write_json
from manifold_cl.plugins import unknown
from manifold_cl.streams.registry import is_code
from manifold_cl.streams.user_streams import open_named
from manifold_cl.study.validation import KEYS, validate_kinds, validate_label, validate_order, validate_seeds

STUDY_FORMAT = "manifold_cl.study"
DEFAULT = "default"
"""Name of a stream's own order."""
REMEDY = "delete this one file, and the command writes it again from the study's TOML; finished cells stay"
FREE = ("name", "reference", "processes", "cpus", "gpus", "cells", "common", "version")
"""Entries of ``study.json`` that do not change the numbers; they may differ between two calls."""


@dataclass(frozen=True)
class MethodEntry:
    """A method of a study: its label, registry name and options, and the search that chose them, if any."""

    label: str
    method: str
    options: Mapping[str, Any]
    search: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        validate_label("label", self.label)
        for key, kinds, words in (
            ("method", str, "the name of a method"),
            ("options", Mapping, "a table"),
            ("search", Mapping | None, "a table"),
        ):
            if not isinstance(getattr(self, key), kinds):
                raise TypeError(f"methods.{self.label}.{key} is {words}, got {getattr(self, key)!r}")


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    label: str
    order: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return "-".join((self.label, *(() if self.order == DEFAULT else (self.order,)), f"seed{self.seed}"))


@dataclass(frozen=True)
class StudyPlan:
    """Everything that determines a study's numbers, and its resources.

    Args:
        name: of the study.
        stream: name of a stream, or ``module:name`` or ``file.py:name`` of a function like those.
        entries: the methods.
        reference: label of the method to compare the others with.
        seeds: of everything random in a run.
        orders: name to task names in order, the same tasks in each.
        paired: whether the i-th order runs with the i-th seed alone; otherwise every order runs with every seed.
        training: options of training, equal for all methods.
        rank: r of every method that has one.
        examples: training examples per task; all by default.
        device: of the models.
        threads: per run; another number may round differently.
        processes: runs at a time, of `LocalEngine`.
        code_folder: folder of the file in ``stream``. With None, as in a plan read from a folder, the stream's own code
            does not run.
        cpus: cores that an engine with several machines keeps for a cell; as many as ``threads`` by default.
        gpus: GPUs for a cell there, such as 0.5 for two cells on one; by default 1 if ``device`` is a GPU, else none.

    Raises:
        ValueError: for an invalid label, order or seed, or a duplicate.
        TypeError: for a value of the wrong kind.
    """

    name: str
    stream: str
    entries: tuple[MethodEntry, ...]
    reference: str
    seeds: tuple[int, ...] = (0,)
    orders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    paired: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    examples: int | None = None
    device: str = "cpu"
    threads: int = 1
    processes: int = 1
    code_folder: Path | None = field(default=Path(), compare=False)
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        validate_name("study", self.name)
        values = {key: getattr(self, key) for key in KEYS if getattr(self, key, None) is not None}
        validate_kinds({**values, "seeds": list(self.seeds), "orders": dict(self.orders)})
        validate_seeds(self.seeds)
        for order, tasks in self.orders.items():
            validate_order(order, tasks)
        if self.paired and len(self.orders) != len(self.seeds):
            raise ValueError(
                f"paired studies have one seed per order, got {len(self.seeds)} seeds and {len(self.orders)} orders"
            )
        labels = [entry.label for entry in self.entries]
        if self.reference not in labels:
            raise ValueError(unknown("reference", self.reference, labels))
        for key, names in (("seeds", [str(seed) for seed in self.seeds]), ("cells", [c.name for c in self.cells])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{key} must differ, {', '.join(twice)} comes twice")

    @classmethod
    def load(cls, folder: Path | str, *, code_folder: Path | str | None = None) -> StudyPlan:
        """The plan in a study's folder.

        Args:
            folder: of the study.
            code_folder: allows code that ``stream`` names to run; its file is relative to this folder.

        Raises:
            FileError: when ``study.json`` is missing, damaged, or of another format.
        """
        path = Path(folder) / "study.json"
        return cls.from_dict(read_json(path, expected=STUDY_FORMAT, remedy=REMEDY), path, code_folder=code_folder)

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], path: Path | str = "study.json", *, code_folder: Path | str | None = None
    ) -> StudyPlan:
        """The plan with this content (`to_dict`), as `load` reads it from ``path``, which stands in messages."""
        try:
            optional = [key for key in ("rank", "examples") if content.get(key) is None]
            validate_kinds({key: content[key] for key in KEYS if key in content and key not in optional})
            entries = tuple(MethodEntry(label=label, **entry) for label, entry in content["methods"].items())
            values = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            code = None if code_folder is None else Path(code_folder)
            return cls(**{**values, "entries": entries, "seeds": tuple(values["seeds"]), "code_folder": code})
        except KeyError as error:
            raise FileError(f"{path} lacks {error}: {REMEDY}") from None
        except (TypeError, ValueError) as error:
            raise FileError(f"{path} holds no study: {error}: {REMEDY}") from None

    def save(self, folder: Path) -> None:
        """Write ``study.json``, atomically."""
        write_json(folder / "study.json", self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of ``study.json`` (docs/record-format.md)."""
        content = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("entries", "paired", "code_folder")
            and not (f.name in ("cpus", "gpus") and getattr(self, f.name) is None)
        }
        return {"format": STUDY_FORMAT, "version": VERSION} | content | {
            "methods": {
                e.label: {"method": e.method, "options": dict(e.options), "search": e.search} for e in self.entries
            },
            "orders": {name: list(tasks) for name, tasks in self.orders.items()},
            "cells": [
                {"label": c.label, "order": c.order, "seed": c.seed, "folder": f"cells/{c.name}"} for c in self.cells
            ],
            "common": {} if self.rank is None else {"rank": self.rank},
            "seeds": list(self.seeds),
        } | ({"paired": True} if self.paired else {})  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """The entries of ``study.json`` that determine numbers, without `FREE` and the searches for options."""
        content = {key: value for key, value in self.to_dict().items() if key not in FREE}
        content["methods"] = {e.label: {"method": e.method, "options": dict(e.options)} for e in self.entries}
        file, colon, name = self.stream.rpartition(":")
        if Path(file).is_absolute():  # the folder on this machine determines no number
            content["stream"] = f"{Path(file).name}{colon}{name}"
        return content

    @cached_property
    def opened(self) -> dict[str, TaskStream]:
        """Streams read so far, by order."""
        return {}

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All runs, ordered by seed, so that the first seed covers every method."""
        return tuple(Cell(entry.label, order, seed) for order, seed in self.replicates for entry in self.entries)

    @property
    def replicates(self) -> list[tuple[str, int]]:
        """The pairs of an order and a seed that every method runs with."""
        if self.paired:
            return list(zip(self.orders, self.seeds, strict=True))
        return [(order, seed) for seed in self.seeds for order in self.orders]

    def cell(self, name: str) -> Cell:
        """The cell of that name; ValueError for an unknown one."""
        cells = {cell.name: cell for cell in self.cells}
        if name not in cells:
            raise ValueError(unknown("cell", name, list(cells)))
        return cells[name]

    def make_method(self, label: str) -> Method:
        """A new method, with the study's rank among its options."""
        entry = next(entry for entry in self.entries if entry.label == label)
        takes_rank = self.rank is not None and "rank" in {f.name for f in fields(METHODS[entry.method])}  # type: ignore[arg-type]
        return make_method(entry.method, **({"rank": self.rank} if takes_rank else {}), **entry.options)

    def open_stream(self, order: str) -> TaskStream:
        """The stream with its tasks in that order, read once."""
        if order not in self.opened:
            self.opened[order] = open_order(
                self.stream, self.orders[order] or None, self.examples, self.code_folder, self.opened
            )
        return self.opened[order]

    def open_anew(self, order: str) -> TaskStream:
        """The same as `open_stream`, read again."""
        return open_order(self.stream, self.orders[order] or None, self.examples, self.code_folder, {})

    def make_training(self, seed: int) -> Training:
        """The training options of all methods, with a cell's seed."""
        return Training(**self.training, seed=seed)

    def make_runner(
        self, cell: Cell, folder: Path, *, on_progress: Callable[[Progress], None] | None = None
    ) -> ContinualRunner:
        """The runner of a cell in the study's ``folder``."""
        return ContinualRunner(
            self.open_stream(cell.order),
            self.make_method(cell.label),
            folder / "cells" / cell.name,
            training=self.make_training(cell.seed),
            device=self.device,
            details={"order": cell.order, "threads": self.threads},
            on_progress=on_progress,
        )

    def changes(self, other: StudyPlan) -> list[str]:
        """Differences that change numbers, one line each, including cells of one plan only."""
        return config_differences(*(dict(_flat(plan.identity())) for plan in (self, other)))

    def extends(self, old: StudyPlan) -> bool:
        """Whether this plan has all cells of the old one with the same numbers."""
        ours, theirs = self.identity(), old.identity()
        for table in ("methods", "orders"):
            ours[table] = {key: value for key, value in ours[table].items() if key in theirs[table]}
        ours["seeds"] = [seed for seed in theirs["seeds"] if seed in self.seeds]
        return set(old.replicates) <= set(self.replicates) and not config_differences(ours, theirs)


def open_order(
    name: str,
    tasks: Sequence[str] | None,
    examples: int | None,
    code_folder: Path | None,
    opened: Mapping[str, TaskStream],
) -> TaskStream:
    """The stream with its tasks in an order; a stream of the registry that is among ``opened`` is not read again."""
    known = next((each for each in opened.values() if tasks and set(each.task_names) == set(tasks)), None)
    if known is None or is_code(name) or len(known.tasks) != len(tasks or ()):
        return open_named(name, tasks, examples, code_folder=code_folder)
    by_name = {task.name: task for task in known.tasks}
    return replace(known, tasks=tuple(by_name[task] for task in tasks or ()))


def _flat(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    if not isinstance(content, Mapping):
        return [(prefix, content)]
    return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)]
