"""Validation of a study's keys, labels, orders and seeds, shared by its TOML file and its ``study.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from manifold_cl.kinds import is_of_kind, is_whole

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
"""Labels and names of orders become folder names."""
LARGEST_SEED = 2**63 - 1
KEYS: Mapping[str, tuple[type, str]] = {
    **dict.fromkeys(("name", "stream", "reference", "device"), (str, "text")),
    "seeds": (list, "a list of whole numbers"),
    "orders": (dict, "a table of lists of task names"),
    "training": (dict, "a table"),
    "methods": (dict, "a table of tables"),
    **dict.fromkeys(("rank", "examples", "threads", "processes"), (int, "a whole number")),
    **dict.fromkeys(("cpus", "gpus"), (float, "a number")),
    **dict.fromkeys(("paired", "unequal_budgets"), (bool, "true or false")),
}
"""Keys of a study's file: the kind of each value, in Python and in words."""


@contextmanager
def named(start: object) -> Iterator[None]:
    """Puts ``start`` in front of the messages of errors about values."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{start}: {error}") from None


def validate_label(kind: str, label: Any) -> None:
    """Raise ValueError for a label that cannot be part of a cell's folder."""
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise ValueError(
            f"{kind} {label!r} becomes a folder's name: letters, digits and _.+- only, up to 100 of them, a letter or "
            "digit first"
        )


def validate_order(order: str, tasks: Any) -> None:
    """Raise TypeError for an order that is no list of names, ValueError for a name that no folder can have."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"orders.{order} is a list of task names, got {tasks!r}")
    validate_label("order", order)


def validate_kinds(values: Mapping[str, Any]) -> None:
    """Raise TypeError for a value of another kind than `KEYS` has, ValueError for a number out of its range."""
    for key, value in values.items():
        kind, words = KEYS[key]
        if not is_of_kind(value, kind):
            raise TypeError(f"{key} is {words}, got {value!r}")
        if kind is int and value < 1:
            raise ValueError(f"{key} is at least 1, got {value}")
        if kind is float:
            validate_share(key, value)


def validate_share(key: str, value: float) -> None:
    """Raise ValueError unless the cpus or gpus of a cell are a part of one below 1, or a whole number.

    No GPUs at all are valid, no cores are not.
    """
    if not math.isfinite(value) or value < 0 or (value > 1 and value != int(value)) or (key == "cpus" and not value):
        least = "above 0" if key == "cpus" else "from 0 on"
        raise ValueError(f"{key} is a number {least}, a fraction up to 1 or a whole number, got {value}")


def validate_seeds(seeds: Sequence[Any]) -> None:
    """Raise ValueError for an empty list, and for seeds that are no whole numbers from 0 to 2⁶³ − 1."""
    valid = [is_whole(s) and 0 <= s <= LARGEST_SEED for s in seeds]
    if not valid or not all(valid):
        raise ValueError(f"seeds is a list of whole numbers from 0 on, got {list(seeds)} (the largest is 2**63 - 1)")
