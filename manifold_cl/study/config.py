"""TOML files of studies, validated completely before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from manifold_cl.continual import METHODS, TaskStream, Training, make_method
from manifold_cl.files import read_toml
from manifold_cl.plugins import unknown
from manifold_cl.study.plan import DEFAULT, MethodEntry, StudyPlan, open_named
from manifold_cl.study.search import read_search, validate_budgets
from manifold_cl.study.validation import KEYS, validate_kinds, validate_label, validate_order


def read_plan(path: Path | str) -> StudyPlan:
    """The plan in a TOML file, validated but for what needs the model (`validate_on_model`).

    Raises:
        FileError: no such file, or no TOML.
        ValueError: an unknown key, method or option (the nearest are named), an invalid value, searches of unequal
            budgets or on the stream that is reported.
        TypeError: a value of the wrong kind.
    """
    path = Path(path)
    content = read_toml(path)
    with _named(path):
        _validate_keys(content)
        entries = tuple(_entry(label, table, path.parent) for label, table in content["methods"].items())
    if not entries:
        raise ValueError(f"{path} lists no methods: give a table [methods.LABEL] for each")
    with _named(path):
        labels = [entry.label for entry in entries]
        reference = content.get("reference", labels[0])
        if reference not in labels:
            raise ValueError(unknown("reference", str(reference), labels))
        training = dict(content.get("training", {}))
        trainable = [f.name for f in fields(Training) if f.name != "seed"]
        if untrainable := [key for key in training if key not in trainable]:
            raise ValueError(unknown("key of training", untrainable[0], trainable))
        stream, code_folder = content["stream"], path.parent.resolve()
        for name, tasks in content.get("orders", {}).items():
            validate_order(name, tasks)
    opened = _streams(content.get("orders", {}), stream, content.get("examples"), path, code_folder)
    tested = training.get("evaluate_on", "test") == "test"
    reported = next(iter(opened.values())).task_names if tested else ()
    validate_budgets(entries, stream=stream, reported=reported, unequal=content.get("unequal_budgets", False))
    threads = content.get("threads", 1)
    with _named(path):
        plan = StudyPlan(
            name=content.get("name", path.stem),
            stream=stream,
            entries=entries,
            reference=reference,
            seeds=tuple(content.get("seeds", (0,))),
            orders={order: list(each.task_names) for order, each in opened.items()},
            training=training,
            rank=content.get("rank"),
            examples=content.get("examples"),
            device=content.get("device", "cpu"),
            threads=threads,
            processes=content.get("processes", max(1, (os.cpu_count() or 1) // threads)),
            code_folder=code_folder,
        )
    plan.opened.update(opened)
    _validate_options(plan, path)
    return plan


def validate_on_model(plan: StudyPlan) -> None:
    """Raise ValueError for options that do not fit the model, such as a rank above a layer's; names the method."""
    stream = plan.open_stream(next(iter(plan.orders)))
    model = stream.make_model()
    for entry in plan.entries:
        try:
            plan.make_method(entry.label).validate_model(model, stream.targets)
        except ValueError as error:
            raise ValueError(f"method {entry.label}: {error}") from None


@contextmanager
def _named(start: Path | str) -> Iterator[None]:
    """Puts the file or the table in front of messages."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{start}: {error}") from None


def _validate_keys(content: Mapping[str, Any]) -> None:
    for key in content:
        if key not in KEYS:
            raise ValueError(unknown("key", key, KEYS))
    for key in ("stream", "methods"):
        if key not in content:
            raise ValueError(f"{key!r} is missing: a study names a stream and has a table [methods.LABEL] per method")
    validate_kinds(content)


def _entry(label: str, table: Any, folder: Path) -> MethodEntry:
    if not isinstance(table, dict):
        raise TypeError(f"methods.{label} is a table of options, got {table!r}")
    validate_label("label", label)
    options = dict(table)
    method = options.pop("method", label)
    if not isinstance(method, str):
        raise TypeError(f"methods.{label}.method is the name of a method, got {method!r}")
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    search = None
    if (file := options.pop("winner_of", None)) is not None:
        winner, search = read_search(folder, file, method)
        if untried := [key for key in options if key not in winner or options[key] != winner[key]]:
            raise ValueError(
                f"methods.{label} sets {', '.join(untried)} beside winner_of, which makes it a setting that the search "
                f"in {file} did not try: take what it sets out, or write all options out without winner_of"
            )
        options = winner
    if "rank" in options:
        raise ValueError(
            f"methods.{label} sets rank {options['rank']}: methods are compared at one rank; write it once, "
            "at the top of the file"
        )
    with _named(f"methods.{label}"):
        make_method(method, **options)
    return MethodEntry(label, method, options, search)


def _streams(
    orders: Mapping[str, list[str] | None], stream: str, examples: int | None, path: Path, code_folder: Path
) -> dict[str, TaskStream]:
    """The stream in every order."""
    opened = {
        name: open_named(stream, tasks, examples, code_folder=code_folder)
        for name, tasks in (orders or {DEFAULT: None}).items()
    }
    first, *others = opened
    expected = opened[first].task_names
    for name in others:
        if sorted(opened[name].task_names) != sorted(expected):
            differing = sorted(set(opened[name].task_names) ^ set(expected))
            raise ValueError(
                f"{path}: orders.{name} has other tasks than orders.{first}: {differing}; "
                "orders are permutations of the same tasks"
            )
    return opened


def _validate_options(plan: StudyPlan, path: Path) -> None:
    try:
        training = plan.make_training(plan.seeds[0])
        training.validate_tasks(len(next(iter(plan.orders.values()))))
        for entry in plan.entries:
            plan.make_method(entry.label).validate_training(training)
        torch.device(plan.device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
