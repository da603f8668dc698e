"""Checks of options and names where they enter, each worded in one place."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

LONGEST = 100
"""Bytes of a name that becomes part of a file's name: two of them and a seed fit into the 255 of a file system."""


def validate_name(kind: str, name: Any) -> None:
    """Refuse a name that cannot be part of a folder's name, or would lead out of its folder.

    Args:
        kind: what is named, for the message.
        name: of it.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty, too long, ``.`` or ``..``, or has a slash, a backslash or a control character in it.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a {kind} is text, got {name!r}")
    if not name.strip() or name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError(
            f"the name of a {kind} is part of a folder's name, so it has no / or \\ or control character in it and is "
            f"not empty, '.' or '..', got {name!r}"
        )
    if (size := len(name.encode())) > LONGEST:
        raise ValueError(
            f"the name of a {kind} is part of a folder's name and has at most {LONGEST} bytes, got {size}: "
            f"{name[:40]!r}…"
        )


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number from ``least`` on.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any, *, least: float = -math.inf) -> None:
    """Refuse what is no finite number from ``least`` on.

    Raises:
        TypeError: it is no number.
        ValueError: it is smaller, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number, got {value!r}")
    if not (math.isfinite(value) and float(value) >= least):
        raise ValueError(f"{name} is a finite number{f' from {least:g} on' if least > -math.inf else ''}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive number.

    Raises:
        TypeError: it is no number.
        ValueError: it is 0 or less, infinite or NaN.
    """
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} is a positive number, got {value}")


def check_share(name: str, value: Any, *, zero: bool = False, one: bool = True) -> None:
    """Refuse what is no share, with or without 0 and 1 themselves.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside.
    """
    check_number(name, value)
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        raise ValueError(f"{name} is a share in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value}")
