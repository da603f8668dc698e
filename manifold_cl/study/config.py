"""TOML files of studies, validated completely before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from manifold_cl.continual import METHODS, TaskStream, Training, make_method
from manifold_cl.continual.finite_weights import validate_finite_weights
from manifold_cl.files import read_toml
from manifold_cl.plugins import unknown
from manifold_cl.study.plan import DEFAULT, MethodEntry, StudyPlan, open_order
from manifold_cl.study.search import read_search, validate_budgets
from manifold_cl.study.validation import KEYS, named, validate_kinds, validate_label, validate_order


def read_plan(path: Path | str) -> StudyPlan:
    """The plan in a TOML file, validated except for the fit to the model (`validate_on_model`).

    Raises:
        FileError: no such file, or no TOML.
        ValueError: an unknown key, method or option, an invalid value, searches of unequal budgets or on the reported
            stream.
        TypeError: a value of the wrong kind.
    """
    path = Path(path)
    content = read_toml(path)
    with named(path):
        _validate_keys(content)
        entries = tuple(_entry(label, table, path.parent) for label, table in content["methods"].items())
        if not entries:
            raise ValueError("the file lists no methods: give a table [methods.LABEL] for each")
        training = dict(content.get("training", {}))
        known = [f.name for f in fields(Training) if f.name != "seed"]
        for key in training:
            if key not in known:
                raise ValueError(unknown("key of training", key, known))
        orders, stream, code_folder = content.get("orders", {}), content["stream"], path.parent.resolve()
        for name, tasks in orders.items():
            validate_order(name, tasks)
    opened: dict[str, TaskStream] = {}
    for name, tasks in (orders or {DEFAULT: None}).items():
        with named(f"{path}: orders.{name}" if orders else f"{path}: stream"):
            opened[name] = open_order(stream, tasks, content.get("examples"), code_folder, opened)
    tested = training.get("evaluate_on", "test") == "test"
    reported = next(iter(opened.values())).task_names if tested else ()
    threads = content.get("threads", 1)
    with named(path):
        validate_budgets(entries, stream=stream, reported=reported, unequal=content.get("unequal_budgets", False))
        _validate_orders(opened)
        plan = StudyPlan(
            name=content.get("name", path.stem),
            stream=stream,
            entries=entries,
            reference=content.get("reference", entries[0].label),
            seeds=tuple(content.get("seeds", (0,))),
            orders={order: list(each.task_names) for order, each in opened.items()},
            training=training,
            **{key: content[key] for key in ("rank", "examples", "device", "paired", "cpus", "gpus") if key in content},
            threads=threads,
            processes=content.get("processes", max(1, (os.cpu_count() or 1) // threads)),
            code_folder=code_folder,
        )
    plan.opened.update(opened)
    _validate_options(plan, path)
    return plan


def validate_on_model(plan: StudyPlan, file: Path | str | None = None) -> None:
    """Raise ValueError for options that do not fit the model, such as a rank above a layer's, with method and file.

    ValueError too for a model with a weight that is NaN or infinite.
    """
    stream = plan.open_stream(next(iter(plan.orders)))
    model = stream.make_model()
    validate_finite_weights(model)
    for entry in plan.entries:
        with named(f"methods.{entry.label}" if file is None else f"{file}: methods.{entry.label}"):
            plan.make_method(entry.label).validate_model(model, stream.targets)


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
    if "method" not in table and label not in METHODS:
        own = f'a label of your own needs method = "NAME" in the table [methods.{label}]'
        raise ValueError(f"methods.{label}: {METHODS.unknown(label)}; {own}")
    search = None
    if (file := options.pop("winner_of", None)) is not None:
        winner, search = read_search(folder, file, method)
        if untried := [key for key in options if key not in winner or options[key] != winner[key]]:
            raise ValueError(
                f"methods.{label} sets {', '.join(untried)} beside winner_of, a setting that the search in {file} did "
                "not try: remove these options, or write all options without winner_of"
            )
        options = winner
    if "rank" in options:
        raise ValueError(
            f"methods.{label} sets rank {options['rank']}: methods are compared at one rank; write it once, "
            "at the top of the file"
        )
    with named(f"methods.{label}"):
        make_method(method, **options)
    return MethodEntry(label, method, options, search)


def _validate_orders(opened: Mapping[str, TaskStream]) -> None:
    first, *others = opened
    for name in others:
        if differing := sorted(set(opened[name].task_names) ^ set(opened[first].task_names)):
            raise ValueError(
                f"orders.{name} has other tasks than orders.{first}: {differing}; all orders need the same tasks"
            )


def _validate_options(plan: StudyPlan, path: Path) -> None:
    try:
        with named(f"{path}: training"):
            training = plan.make_training(plan.seeds[0])
            training.validate_tasks(len(next(iter(plan.orders.values()))))
        for entry in plan.entries:
            with named(f"{path}: methods.{entry.label}"):
                plan.make_method(entry.label).validate_training(training)
    except TypeError as error:
        raise ValueError(str(error)) from None
    try:
        torch.device(plan.device)
    except RuntimeError:
        raise ValueError(f"{path}: device is cpu, cuda or another device of torch, got {plan.device!r}") from None
