"""The files of a study: ``study.json``, and the run folders of its cells (docs/record-format.md)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.formats import Record, check_format, read_json

KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


class CellKey(NamedTuple):
    """One run of a study: a method's label, an order of the tasks, a seed."""

    label: str
    order: str
    seed: int


@dataclass(frozen=True)
class UnfinishedCell:
    """A cell that is not complete, and how far it came."""

    cell: CellKey
    started: bool
    """Whether there is a record of it."""
    done: int
    """Tasks learned and evaluated."""
    tasks: int


@dataclass(frozen=True)
class StudyMethod:
    """A method of a study: its registry name, its options, and the search that they come from."""

    method: str
    options: Mapping[str, Any]
    search: Mapping[str, Any] | None
    """File, stream, number of trials and best score of the search; None where the options are starting points."""


@dataclass(frozen=True, eq=False)
class StudyFile:
    """What ``study.json`` says."""

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
    """Device, threads a process, and processes, as far as they were noted."""


def read_study_file(path: str | Path) -> StudyFile:
    """What the ``study.json`` in a folder says, or the one named directly.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, of another format or version, or contradicts itself.
    """
    file = Path(path)
    file = file / "study.json" if file.is_dir() else file
    data = read_json(file)
    check_format(file, data, "manifold_cl.study")
    methods = {label: _planned(file, label, said) for label, said in _need(file, data, "methods", dict).items()}
    named = _need(file, data, "orders", dict)
    orders = {name: tuple(_members(file, named, name, str, "orders")) for name in named}
    seeds = tuple(_members(file, data, "seeds", int))
    cells: dict[CellKey, Path] = {}
    for place, said in enumerate(_need(file, data, "cells", list)):
        cell, folder = _cell(file, place, said)
        for what, found, known in (
            ("method", cell.label, list(methods)),
            ("order", cell.order, list(orders)),
            ("seed", cell.seed, list(seeds)),
        ):
            if found not in known:
                raise ValueError(f"{file}: cells[{place}] has the {what} {found!r}, which is not among {known}")
        if cell in cells:
            raise ValueError(f"{file}: {_name(cell)} is listed twice among the cells")
        cells[cell] = folder
    reference = _need(file, data, "reference", str)
    if reference not in methods:
        raise ValueError(f"{file}: reference {reference!r} is not among the methods: {', '.join(methods)}")
    return StudyFile(
        file=file,
        name=_need(file, data, "name", str),
        stream=_need(file, data, "stream", str),
        reference=reference,
        seeds=seeds,
        orders=orders,
        training=_object(file, data, "training") or {},
        common=_object(file, data, "common") or {},
        methods=methods,
        cells=cells,
        resources={key: data[key] for key in ("device", "threads", "processes") if data.get(key) is not None},
    )


def read_cells(plan: StudyFile) -> tuple[dict[CellKey, Record], list[UnfinishedCell]]:
    """Records of the complete cells, and what is known of the others, in the order of the plan.

    Raises:
        ValueError: a record is truncated, of another format, or not of the run that the plan describes.
    """
    complete: dict[CellKey, Record] = {}
    unfinished: list[UnfinishedCell] = []
    for cell, folder in plan.cells.items():
        count = len(plan.orders[cell.order])
        if not (folder / "record.json").exists():
            unfinished.append(UnfinishedCell(cell, False, 0, count))
            continue
        record = Record.load(folder)
        if wrong := list(_contradictions(plan, cell, record)):
            raise ValueError(
                f"{folder / 'record.json'} is not the run that {plan.file.name} describes for {_name(cell)}: "
                f"{'; '.join(wrong)}. Move it away, or run the study in a new folder"
            )
        if record.status == "complete":
            complete[cell] = record
        else:
            done = int((~np.isnan(record.matrix).all(axis=1)).sum())
            unfinished.append(UnfinishedCell(cell, True, done, count))
    return complete, unfinished


def _contradictions(plan: StudyFile, cell: CellKey, record: Record) -> Iterator[str]:
    """Where a record is not what the plan asked for; keys that only one of them has do not matter."""
    planned = plan.methods[cell.label]
    said: dict[str, Any] = {"method": record.method, "stream": record.stream, "tasks": list(record.tasks)}
    said |= {key: value for key, value in record.config.items() if key not in said}
    asked = {**plan.training, **plan.common, **planned.options, "seed": cell.seed}
    if ":" not in plan.stream:  # else it names the function that builds the stream, not the stream
        asked["stream"] = plan.stream
    asked |= {"method": planned.method, "tasks": list(plan.orders[cell.order])}
    for key in sorted(asked.keys() & said.keys()):
        if asked[key] != said[key]:
            yield f"{key} is {said[key]!r}, not {asked[key]!r}"


def _planned(file: Path, label: str, said: Any) -> StudyMethod:
    place = f"methods[{label!r}]"
    if not isinstance(said, dict):
        raise ValueError(f"{file}: {place} is a {type(said).__name__}, an object was expected")
    method = _need(file, said, "method", str, place)
    return StudyMethod(method, _object(file, said, "options", place) or {}, _object(file, said, "search", place))


def _cell(file: Path, place: int, said: Any) -> tuple[CellKey, Path]:
    where = f"cells[{place}]"
    if not isinstance(said, dict):
        raise ValueError(f"{file}: {where} is a {type(said).__name__}, an object was expected")
    label, order, folder = (_need(file, said, key, str, where) for key in ("label", "order", "folder"))
    path = file.parent / folder
    if not path.resolve().is_relative_to(file.parent.resolve()):
        raise ValueError(f"{file}: {where} lies at {folder!r}, outside the study's folder")
    return CellKey(label, order, _need(file, said, "seed", int, where)), path


def _need(file: Path, data: Mapping[str, Any], key: str, kind: type, place: str = "") -> Any:
    value = data.get(key)
    if not _is(value, kind):
        raise ValueError(f"{_found(file, data, key, place)}, {KINDS[kind]} was expected")
    return value


def _members(file: Path, data: Mapping[str, Any], key: str, kind: type, place: str = "") -> list[Any]:
    """The members of a list, all of one kind and no two alike."""
    members: list[Any] = _need(file, data, key, list, place)
    if not all(_is(member, kind) for member in members) or len(set(members)) < len(members):
        raise ValueError(
            f"{_found(file, data, key, place)}, a list was expected whose members differ and are each {KINDS[kind]}"
        )
    return members


def _object(file: Path, data: Mapping[str, Any], key: str, place: str = "") -> dict[str, Any] | None:
    """An object, or None where the key is missing or null."""
    value = data.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{_found(file, data, key, place)}, an object or null was expected")
    return value


def _is(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of a kind; true and false are no whole numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _found(file: Path, data: Mapping[str, Any], key: str, place: str) -> str:
    found = f"{data[key]!r:.80}" if key in data else "missing"
    return f"{file}: {f'{place}: ' if place else ''}{key!r} is {found}"


def _name(cell: CellKey) -> str:
    return f"{cell.label!r}, order {cell.order!r}, seed {cell.seed}"
