"""Files of a study: ``study.json``, and the run folders of its cells (docs/record-format.md)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.formats import Record, is_of_kind, read_format, value_of


class CellKey(NamedTuple):
    """One run of a study: a method's label, an order of the tasks, a seed."""

    label: str
    order: str
    seed: int

    def __str__(self) -> str:
        return f"{self.label!r}, order {self.order!r}, seed {self.seed}"


@dataclass(frozen=True)
class UnfinishedCell:
    """A cell that is not complete, and its progress."""

    cell: CellKey
    started: bool
    """Whether it has a record."""
    done: int
    """Tasks learned and evaluated."""
    tasks: int


@dataclass(frozen=True)
class StudyMethod:
    """A method of a study: its registry name, its options, and the search that chose them."""

    method: str
    options: Mapping[str, Any]
    search: Mapping[str, Any] | None
    """File, stream, number of trials and best score of the search; None for options that were not searched."""


@dataclass(frozen=True, eq=False)
class StudyFile:
    """The contents of ``study.json``."""

    file: Path
    name: str
    stream: str
    reference: str
    seeds: tuple[int, ...]
    orders: Mapping[str, tuple[str, ...]]
    training: Mapping[str, Any]
    common: Mapping[str, Any]
    methods: Mapping[str, StudyMethod]
    cells: Mapping[CellKey, Path]
    resources: Mapping[str, Any]
    """Device, threads per process, and processes, as far as they are given."""

    @classmethod
    def load(cls, path: str | Path) -> "StudyFile":
        """The ``study.json`` in a folder, or the file itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, of another format or version, or contradicts itself.
        """
        file, data = read_format(path, "study.json", "manifold_cl.study")
        methods = {label: _method(file, label, data["methods"]) for label in value_of(file, data, "methods", dict)}
        given = value_of(file, data, "orders", dict)
        orders = {name: tuple(_members(file, given, name, str, "orders")) for name in given}
        seeds = tuple(_members(file, data, "seeds", int))
        reference = value_of(file, data, "reference", str)
        if reference not in methods:
            raise ValueError(f"{file}: reference {reference!r} is not among the methods: {', '.join(methods)}")
        return cls(
            file=file,
            name=value_of(file, data, "name", str),
            stream=value_of(file, data, "stream", str),
            training=value_of(file, data, "training", dict, null=True) or {},
            common=value_of(file, data, "common", dict, null=True) or {},
            reference=reference,
            seeds=seeds,
            orders=orders,
            methods=methods,
            cells=_cells(file, data, list(methods), list(orders), list(seeds)),
            resources={key: data[key] for key in ("device", "threads", "processes") if data.get(key) is not None},
        )

    def read_cells(self) -> tuple[dict[CellKey, Record], list[UnfinishedCell]]:
        """Records of the complete cells, and progress of the others, in the order of the file.

        Raises:
            ValueError: a record is truncated, of another format, or of another run than the file describes.
        """
        complete: dict[CellKey, Record] = {}
        unfinished: list[UnfinishedCell] = []
        for cell, folder in self.cells.items():
            count = len(self.orders[cell.order])
            if not (folder / "record.json").exists():
                unfinished.append(UnfinishedCell(cell, False, 0, count))
                continue
            record = Record.load(folder)
            if differences := list(self._differences(cell, record)):
                problem = f"is not the run that {self.file.name} describes for {cell}: {'; '.join(differences)}"
                raise ValueError(f"{folder / 'record.json'} {problem}. Move it away, or run the study in a new folder")
            if record.status == "complete":
                complete[cell] = record
            else:
                done = int((~np.isnan(record.matrix).all(axis=1)).sum())
                unfinished.append(UnfinishedCell(cell, True, done, count))
        return complete, unfinished

    def _differences(self, cell: CellKey, record: Record) -> Iterator[str]:
        """Differences between a record and the file; keys that only one of them has do not count."""
        planned = self.methods[cell.label]
        actual: dict[str, Any] = {**record.config, "method": record.method, "tasks": list(record.tasks)}
        actual["stream"] = record.stream
        expected = {**self.training, **self.common, **planned.options, "seed": cell.seed}
        if ":" not in self.stream:  # else it names the function that builds the stream, not the stream
            expected["stream"] = self.stream
        expected |= {"method": planned.method, "tasks": list(self.orders[cell.order])}
        for key in sorted(expected.keys() & actual.keys()):
            if expected[key] != actual[key]:
                yield f"{key} is {actual[key]!r}, not {expected[key]!r}"


def _method(file: Path, label: str, methods: Mapping[str, Any]) -> StudyMethod:
    within = f"methods[{label!r}]"
    data = value_of(file, methods, label, dict, within="methods")
    return StudyMethod(
        value_of(file, data, "method", str, within=within),
        value_of(file, data, "options", dict, within=within, null=True) or {},
        value_of(file, data, "search", dict, within=within, null=True),
    )


def _cells(
    file: Path, data: Mapping[str, Any], labels: list[str], orders: list[str], seeds: list[int]
) -> dict[CellKey, Path]:
    """Each cell to its folder."""
    cells: dict[CellKey, Path] = {}
    for index, entry in enumerate(value_of(file, data, "cells", list)):
        within = f"cells[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: {within} is a {type(entry).__name__}, an object was expected")
        label, order, folder = (value_of(file, entry, key, str, within=within) for key in ("label", "order", "folder"))
        cell = CellKey(label, order, value_of(file, entry, "seed", int, within=within))
        for key, value, allowed in (("method", label, labels), ("order", order, orders), ("seed", cell.seed, seeds)):
            if value not in allowed:
                raise ValueError(f"{file}: {within} has the {key} {value!r}, which is not among {allowed}")
        path = file.parent / folder
        if "\0" in folder or not path.resolve().is_relative_to(file.parent.resolve()):
            raise ValueError(f"{file}: {within} has the folder {folder!r}, outside the study's folder")
        if cell in cells:
            raise ValueError(f"{file}: {cell} is listed twice among the cells")
        cells[cell] = path
    return cells


def _members(file: Path, data: Mapping[str, Any], key: str, kind: type, within: str = "") -> list[Any]:
    """The members of a list, all of one kind and different."""
    members: list[Any] = value_of(file, data, key, list, within=within)
    alike = all(is_of_kind(member, kind) for member in members)
    if alike and len(set(members)) == len(members):
        return members
    expected = f"a list was expected whose members differ and are each {'text' if kind is str else 'a whole number'}"
    raise ValueError(f"{file}: {f'{within}: ' if within else ''}{key!r} is {members!r:.80}, {expected}")
