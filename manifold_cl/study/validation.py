"""Checks of a study's keys, labels, orders and seeds: the same for its TOML file and for its ``study.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
"""Labels and names of orders become folder names."""
LARGEST_SEED = 2**63 - 1
KEYS: Mapping[str, tuple[type, str]] = {
    "name": (str, "text"),
    "stream": (str, "text"),
    "reference": (str, "text"),
    "device": (str, "text"),
    "seeds": (list, "a list of whole numbers"),
    "orders": (dict, "a table of lists of task names"),
    "training": (dict, "a table"),
    "methods": (dict, "a table of tables"),
    "rank": (int, "a whole number"),
    "examples": (int, "a whole number"),
    "threads": (int, "a whole number"),
    "processes": (int, "a whole number"),
    "unequal_budgets": (bool, "true or false"),
}
"""What a study's file may hold: the kind of each value, and that kind in words."""


def validate_label(kind: str, label: Any) -> None:
    """Refuse what cannot be part of a cell's folder.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise ValueError(
            f"{kind} {label!r} becomes a folder's name: letters, digits and _.+- only, up to 100 of them, a letter or "
            "digit first"
        )


def validate_order(order: str, tasks: Any) -> None:
    """Refuse an order that is no list of names, or whose name cannot be part of a cell's folder.

    Raises:
        TypeError: it is no list of names.
        ValueError: for its name.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"orders.{order} is a list of task names, got {tasks!r}")
    validate_label("order", order)


def validate_kinds(given: Mapping[str, Any]) -> None:
    """Refuse values of `KEYS` of another kind, and numbers below 1.

    Raises:
        TypeError: naming the key and the kind.
        ValueError: naming the key.
    """
    for key, value in given.items():
        kind, said = KEYS[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(f"{key} is {said}, got {value!r}")
        if isinstance(value, int) and kind is int and value < 1:
            raise ValueError(f"{key} is at least 1, got {value}")


def validate_seeds(seeds: Sequence[Any]) -> None:
    """Refuse seeds that are no whole numbers from 0 on, or too large, and a list without any.

    Raises:
        ValueError: with the list.
    """
    fit = [isinstance(s, int) and not isinstance(s, bool) and 0 <= s <= LARGEST_SEED for s in seeds]
    if not fit or not all(fit):
        raise ValueError(f"seeds is a list of whole numbers from 0 on, got {list(seeds)} (the largest is 2**63 - 1)")
