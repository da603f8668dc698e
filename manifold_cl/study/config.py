"""A study's TOML file, checked whole before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from manifold_cl.continual import METHODS, TaskStream, Training, make_method
from manifold_cl.files import read_toml
from manifold_cl.plugins import unknown
from manifold_cl.study.plan import DEFAULT, Entry, StudyPlan, open_named
from manifold_cl.study.search import check_budgets, read_search
from manifold_cl.study.validation import KEYS, validate_kinds, validate_label, validate_order


def read_plan(path: Path | str) -> StudyPlan:
    """The plan in a TOML file, checked but for what needs the model.

    Raises:
        FileError: no such file, or no TOML.
        ValueError: an unknown key, method or option (the nearest are named), a value that cannot be, searches of
            unequal budgets or on the stream that is reported.
        TypeError: a value of the wrong kind.
    """
    path = Path(path)
    return _plan(read_toml(path), path)


def check_on_model(plan: StudyPlan) -> None:
    """Refuse what the model has no room for, such as a rank above a layer's, before the first minute is spent.

    Raises:
        ValueError: naming the method.
    """
    stream = plan.open_stream(next(iter(plan.orders)))
    model = stream.make_model()
    for entry in plan.entries:
        try:
            plan.make_method(entry.label).validate_model(model, stream.targets)
        except ValueError as error:
            raise ValueError(f"method {entry.label}: {error}") from None


def _plan(given: Mapping[str, Any], path: Path) -> StudyPlan:
    for key in given:
        if key not in KEYS:
            raise ValueError(f"{path}: {unknown('key', key, KEYS)}")
    for key in ("stream", "methods"):
        if key not in given:
            raise ValueError(f"{path} lacks {key!r}: a study names a stream and has a table [methods.LABEL] a method")
    try:
        validate_kinds(given)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None
    entries = tuple(_entry(label, content, path) for label, content in given["methods"].items())
    if not entries:
        raise ValueError(f"{path} lists no methods: give a table [methods.LABEL] for each")
    labels = [entry.label for entry in entries]
    reference = given.get("reference", labels[0])
    if reference not in labels:
        raise ValueError(f"{path}: {unknown('reference', str(reference), labels)}")
    training = dict(given.get("training", {}))
    trainable = [f.name for f in fields(Training) if f.name != "seed"]
    for key in training:
        if key not in trainable:
            raise ValueError(f"{path}: {unknown('key of training', key, trainable)}")
    stream, code_folder = given["stream"], path.parent.resolve()
    tested = training.get("evaluate_on", "test") == "test"
    opened = _streams(given.get("orders", {}), stream, given.get("examples"), path, code_folder)
    reported = next(iter(opened.values())).task_names if tested else ()
    check_budgets(entries, stream=stream, reported=reported, unequal=given.get("unequal_budgets", False))
    try:
        plan = StudyPlan(
            name=given.get("name", path.stem),
            stream=stream,
            entries=entries,
            reference=reference,
            seeds=tuple(given.get("seeds", (0,))),
            orders={order: list(each.task_names) for order, each in opened.items()},
            training=training,
            rank=given.get("rank"),
            examples=given.get("examples"),
            device=given.get("device", "cpu"),
            threads=given.get("threads", 1),
            processes=given.get("processes", max(1, (os.cpu_count() or 1) // given.get("threads", 1))),
            code_folder=code_folder,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None
    plan.opened.update(opened)
    _check(plan, path)
    return plan


def _entry(label: str, content: Any, path: Path) -> Entry:
    if not isinstance(content, dict):
        raise TypeError(f"{path}: methods.{label} is a table of options, got {content!r}")
    try:
        validate_label("label", label)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    options = dict(content)
    method = options.pop("method", label)
    if not isinstance(method, str):
        raise TypeError(f"{path}: methods.{label}.method is the name of a method, got {method!r}")
    if method not in METHODS:
        raise ValueError(f"{path}: {unknown('method', method, METHODS)}")
    search = None
    if (file := options.pop("winner_of", None)) is not None:
        winner, search = read_search(path.parent, file, method)
        if untried := [key for key in options if key not in winner or options[key] != winner[key]]:
            raise ValueError(
                f"{path}: methods.{label} sets {', '.join(untried)} beside winner_of, which makes it a setting that "
                f"the search in {file} did not try: take what it sets out, or write all options out without winner_of"
            )
        options = winner
    if "rank" in options:
        raise ValueError(
            f"{path}: methods.{label} sets rank {options['rank']}: methods are compared at one rank; write it once, "
            "at the top of the file"
        )
    try:
        make_method(method, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: methods.{label}: {error}") from None
    return Entry(label, method, options, search)


def _streams(
    given: Mapping[str, Any], stream: str, examples: int | None, path: Path, code_folder: Path
) -> dict[str, TaskStream]:
    """The stream in every order."""
    orders: Mapping[str, list[str] | None] = given or {DEFAULT: None}
    for name, tasks in given.items():
        try:
            validate_order(name, tasks)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None
    opened = {name: open_named(stream, tasks, examples, code_folder=code_folder) for name, tasks in orders.items()}
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


def _check(plan: StudyPlan, path: Path) -> None:
    try:
        training = plan.make_training(plan.seeds[0])
        training.validate_tasks(len(next(iter(plan.orders.values()))))
        for entry in plan.entries:
            plan.make_method(entry.label).validate_training(training)
        torch.device(plan.device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
