"""Rules for numbers and text: whole, finite, positive, a share of 1. Each rule and its message has this one place.

Every rule raises `TypeError` for a value of the wrong kind and `ValueError` for one out of range, with name and value.
Numbers of numpy count as numbers; true and false do not.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def validate_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse anything but a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def validate_number(name: str, value: Any, *, least: float = -math.inf) -> None:
    """Refuse anything but a finite number of at least ``least``."""
    _require_real(name, value)
    if not (math.isfinite(value) and float(value) >= least):
        raise ValueError(f"{name} is a finite number{f' from {least:g} on' if least > -math.inf else ''}, got {value}")


def validate_positive(name: str, value: Any) -> None:
    """Refuse anything but a positive number."""
    validate_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} is a positive number, got {value}")


def validate_share(name: str, value: Any, *, zero: bool = False, one: bool = True) -> None:
    """Refuse anything but a share, with or without 0 and 1 themselves."""
    _require_real(name, value)
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        raise ValueError(f"{name} is a share in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value}")


def validate_text(name: str, value: Any) -> None:
    """Refuse anything but text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is text, got {value!r}")


def validate_kind(name: str, value: Any, kind: type, *, remedy: str) -> None:
    """Refuse anything but an instance of ``kind``; ``remedy`` says what to give in its place.

    >>> validate_kind("memory", "folder", dict, remedy="load it first")
    Traceback (most recent call last):
    TypeError: memory is a dict, got 'folder': load it first
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {kind.__name__}, got {described(value)}: {remedy}")


def described(value: Any) -> str:
    """A value in a message: short values as they are, functions and classes by name, others by their class."""
    if value is None or isinstance(value, str | int | float):
        return f"{value!r:.60}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = getattr(value, "__name__", None)
    return f"the function {name}" if callable(value) and isinstance(name, str) else f"a {type(value).__name__}"


def _require_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number, got {value!r}")
