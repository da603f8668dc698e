"""What a study is: its methods, its cells, and the file that lies beside its results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from manifold_cl.adapters.files import VERSION, read_json, write_json
from manifold_cl.continual import METHODS, ContinualRunner, Method, TaskStream, Training, make_method
from manifold_cl.continual.record import differences
from manifold_cl.continual.runner import Progress
from manifold_cl.plugins import load_object
from manifold_cl.streams import open_stream

STUDY_FORMAT = "manifold_cl.study"
DEFAULT = "default"
"""Name of the order in which a stream has its tasks, where none is given."""
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""Labels and names of orders become folder names."""
FREE = ("name", "reference", "processes", "cells", "common", "version")
"""Entries of ``study.json`` that determine no number of their own: they may change between two calls."""


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method with its options, and the search that these come from, if any."""

    label: str
    method: str
    options: Mapping[str, Any]
    search: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    label: str
    order: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return "-".join((self.label, *(() if self.order == DEFAULT else (self.order,)), f"seed{self.seed}"))


@dataclass(frozen=True)
class StudyPlan:
    """All that determines a study's numbers, and how it is run.

    Args:
        name: of the study.
        stream: name of a stream, or ``module:name`` or ``file.py:name`` of a function like those.
        entries: the methods.
        reference: label of the method that the others are compared with.
        seeds: of everything random in a run.
        orders: name → task names in order; the same tasks in each.
        training: what is equal for all methods.
        rank: r of every method that has one.
        examples: training examples a task; all by default.
        device: where models run.
        threads: of each run; other numbers of threads may round differently.
        processes: runs at a time.
    """

    name: str
    stream: str
    entries: tuple[Entry, ...]
    reference: str
    seeds: tuple[int, ...] = (0,)
    orders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    examples: int | None = None
    device: str = "cpu"
    threads: int = 1
    processes: int = 1

    @classmethod
    def load(cls, folder: Path | str) -> StudyPlan:
        """The plan in a study's folder.

        Raises:
            FileError: when ``study.json`` is missing, damaged or of another format.
        """
        remedy = "delete this one file, and the command writes it again from the study's TOML; finished cells stay"
        found = read_json(Path(folder) / "study.json", expected=STUDY_FORMAT, remedy=remedy)
        entries = tuple(Entry(label=label, **entry) for label, entry in found["methods"].items())
        plain = {f.name: found[f.name] for f in fields(cls) if f.name in found and f.name != "entries"}
        return cls(**{**plain, "entries": entries, "seeds": tuple(plain["seeds"])})

    def save(self, folder: Path) -> None:
        """Write ``study.json``, atomically."""
        write_json(folder / "study.json", self.plain())

    def plain(self) -> dict[str, Any]:
        """The content of ``study.json`` (docs/record-format.md)."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "entries"}
        content["methods"] = {
            e.label: {"method": e.method, "options": dict(e.options), "search": e.search} for e in self.entries
        }
        content["orders"] = {name: list(tasks) for name, tasks in self.orders.items()}
        content["cells"] = [
            {"label": c.label, "order": c.order, "seed": c.seed, "folder": f"cells/{c.name}"} for c in self.cells
        ]
        content["common"] = {} if self.rank is None else {"rank": self.rank}
        return {"format": STUDY_FORMAT, "version": VERSION, **content, "seeds": list(self.seeds)}

    def numbers(self) -> dict[str, Any]:
        """What of ``study.json`` determines numbers: all but `FREE` and the searches that options come from."""
        content = {key: value for key, value in self.plain().items() if key not in FREE}
        content["methods"] = {e.label: {"method": e.method, "options": dict(e.options)} for e in self.entries}
        return content

    @cached_property
    def opened(self) -> dict[str, TaskStream]:
        """Streams that were read already, by order."""
        return {}

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every run, seed by seed: after the first seed there is one of every method."""
        return tuple(
            Cell(entry.label, order, seed) for seed in self.seeds for order in self.orders for entry in self.entries
        )

    def cell(self, name: str) -> Cell:
        """The cell of that name."""
        return next(cell for cell in self.cells if cell.name == name)

    def make_method(self, label: str) -> Method:
        """A fresh method, the study's rank among its options."""
        entry = next(entry for entry in self.entries if entry.label == label)
        takes_rank = self.rank is not None and "rank" in {f.name for f in fields(METHODS[entry.method])}  # type: ignore[arg-type]
        return make_method(entry.method, **({"rank": self.rank} if takes_rank else {}), **entry.options)

    def open_stream(self, order: str) -> TaskStream:
        """The stream with its tasks in that order, read once."""
        if order not in self.opened:
            self.opened[order] = open_named(self.stream, self.orders[order] or None, self.examples)
        return self.opened[order]

    def make_training(self, seed: int) -> Training:
        """What is equal for all methods, with a cell's seed."""
        return Training(**self.training, seed=seed)

    def make_runner(
        self,
        cell: Cell,
        folder: Path,
        *,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> ContinualRunner:
        """What runs a cell of the study in ``folder``; its ``config`` is what the cell's record must say.

        Args:
            cell: one of `cells`.
            folder: of the study.
            on_progress: called at every step and phase.
        """
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
        """Where the other plan would give other numbers, one line each; cells that only one has among them."""
        ours, theirs = (dict(_flat(plan.numbers())) for plan in (self, other))
        return differences(ours, theirs)

    def extends(self, old: StudyPlan) -> bool:
        """Whether it has all cells of the old plan, to the same numbers, and maybe others."""
        ours, theirs = self.numbers(), old.numbers()
        grown = all(
            ours[table].get(key) == value for table in ("methods", "orders") for key, value in theirs[table].items()
        )
        same = all(ours[key] == theirs[key] for key in ("stream", "training", "rank", "examples", "device", "threads"))
        return grown and same and set(self.seeds) >= set(old.seeds)


def open_named(name: str, tasks: Sequence[str] | None, examples: int | None) -> TaskStream:
    """The stream of that name, or that a function of the user builds."""
    if ":" in name:
        stream: TaskStream = load_object(name)(tasks=tasks, examples=examples)
        return stream
    return open_stream(name, tasks=tasks, examples=examples)


def _flat(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    if not isinstance(content, Mapping):
        return [(prefix, content)]
    return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)]
