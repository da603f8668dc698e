"""What a study is: its methods, its cells, and the file that lies beside its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from manifold_cl.continual import METHODS, ContinualRunner, Method, TaskStream, Training, make_method
from manifold_cl.continual.record import config_differences
from manifold_cl.continual.runner import Progress
from manifold_cl.continual.validation import validate_name
from manifold_cl.files import VERSION, FileError, read_json, write_json
from manifold_cl.plugins import load_object, unknown
from manifold_cl.streams import open_stream
from manifold_cl.study.validation import KEYS, validate_kinds, validate_label, validate_order, validate_seeds

STUDY_FORMAT = "manifold_cl.study"
DEFAULT = "default"
"""Name of the order in which a stream has its tasks, where none is given."""
REMEDY = "delete this one file, and the command writes it again from the study's TOML; finished cells stay"
FREE = ("name", "reference", "processes", "cells", "common", "version")
"""Entries of ``study.json`` that determine no number of their own: they may change between two calls."""


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method with its options, and the search that these come from, if any."""

    label: str
    method: str
    options: Mapping[str, Any]
    search: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        validate_label("label", self.label)
        for key, kinds, said in (
            ("method", str, "the name of a method"),
            ("options", Mapping, "a table"),
            ("search", Mapping | None, "a table"),
        ):
            if not isinstance(getattr(self, key), kinds):
                raise TypeError(f"methods.{self.label}.{key} is {said}, got {getattr(self, key)!r}")


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
        code_folder: folder that the file in ``stream`` is relative to. None where nobody asked for the stream's own
            code: a plan that was read from a folder runs none.

    Raises:
        ValueError: for a label, order or seed that cannot be, or one that comes twice.
        TypeError: for a value of the wrong kind.
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
    code_folder: Path | None = field(default=Path(), compare=False)

    def __post_init__(self) -> None:
        validate_name("study", self.name)
        content = {key: getattr(self, key) for key in KEYS if getattr(self, key, None) is not None}
        validate_kinds({**content, "seeds": list(self.seeds), "orders": dict(self.orders)})
        validate_seeds(self.seeds)
        for order, tasks in self.orders.items():
            validate_order(order, tasks)
        names = [entry.label for entry in self.entries]
        if self.reference not in names:
            raise ValueError(unknown("reference", self.reference, names))
        for what, values in (("seeds", self.seeds), ("cells", [cell.name for cell in self.cells])):
            if twice := sorted({str(value) for value in values if list(values).count(value) > 1}):
                raise ValueError(f"{what} must differ, {', '.join(twice)} comes twice")

    @classmethod
    def load(cls, folder: Path | str, *, code_folder: Path | str | None = None) -> StudyPlan:
        """The plan in a study's folder.

        Args:
            folder: of the study.
            code_folder: lets the code run that ``stream`` may name, and is the folder that its file is relative to.

        Raises:
            FileError: when ``study.json`` is missing, damaged, of another format, or no study.
        """
        path = Path(folder) / "study.json"
        found = read_json(path, expected=STUDY_FORMAT, remedy=REMEDY)
        code = None if code_folder is None else Path(code_folder)
        try:
            free = ("rank", "examples")  # null where they are not limited
            validate_kinds({k: v for k, v in found.items() if k in KEYS and not (v is None and k in free)})
            entries = tuple(Entry(label=label, **entry) for label, entry in found["methods"].items())
            plain = {f.name: found[f.name] for f in fields(cls) if f.name in found and f.name != "entries"}
            return cls(**{**plain, "entries": entries, "seeds": tuple(plain["seeds"]), "code_folder": code})
        except KeyError as error:
            raise FileError(f"{path} lacks {error}: {REMEDY}") from None
        except (TypeError, ValueError) as error:
            raise FileError(f"{path} holds no study: {error}: {REMEDY}") from None

    def save(self, folder: Path) -> None:
        """Write ``study.json``, atomically."""
        write_json(folder / "study.json", self.plain())

    def plain(self) -> dict[str, Any]:
        """The content of ``study.json`` (docs/record-format.md)."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("entries", "code_folder")}
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
        place, colon, name = self.stream.rpartition(":")
        if Path(place).is_absolute():  # where the file lies on this machine determines no number
            content["stream"] = f"{Path(place).name}{colon}{name}"
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
        """The cell of that name.

        Raises:
            ValueError: there is none.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise ValueError(unknown("cell", name, [cell.name for cell in self.cells]))

    def make_method(self, label: str) -> Method:
        """A fresh method, the study's rank among its options."""
        entry = next(entry for entry in self.entries if entry.label == label)
        takes_rank = self.rank is not None and "rank" in {f.name for f in fields(METHODS[entry.method])}  # type: ignore[arg-type]
        return make_method(entry.method, **({"rank": self.rank} if takes_rank else {}), **entry.options)

    def open_stream(self, order: str) -> TaskStream:
        """The stream with its tasks in that order, read once."""
        if order not in self.opened:
            self.opened[order] = open_named(
                self.stream, self.orders[order] or None, self.examples, code_folder=self.code_folder
            )
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
        return config_differences(ours, theirs)

    def extends(self, old: StudyPlan) -> bool:
        """Whether it has all cells of the old plan, to the same numbers, and maybe others."""
        ours, theirs = self.numbers(), old.numbers()
        grown = all(
            ours[table].get(key) == value for table in ("methods", "orders") for key, value in theirs[table].items()
        )
        same = all(ours[key] == theirs[key] for key in ("stream", "training", "rank", "examples", "device", "threads"))
        return grown and same and set(self.seeds) >= set(old.seeds)


def open_named(name: str, tasks: Sequence[str] | None, examples: int | None, *, code_folder: Path | None) -> TaskStream:
    """The stream of that name, or that a function of the user builds.

    Raises:
        ValueError: for code where ``code_folder`` is None: nobody asked for it.
    """
    if not is_code(name):
        return open_stream(name, tasks=tasks, examples=examples)
    if code_folder is None:
        raise ValueError(
            f"the stream {name!r} is code, which runs only where it is asked for: run the study from its TOML file, or "
            "read it with StudyPlan.load(folder, code_folder=...)"
        )
    place, _, function = name.rpartition(":")
    located = str(code_folder / place) if place.endswith(".py") else place
    stream: TaskStream = load_object(f"{located}:{function}")(tasks=tasks, examples=examples)
    return stream


def is_code(stream: str) -> bool:
    """Whether a study's stream is ``module:name`` or ``file.py:name``, a function of the user's."""
    return ":" in stream


def _flat(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    if not isinstance(content, Mapping):
        return [(prefix, content)]
    return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)]
