"""Kinds of plain values, as JSON and TOML have them: true and false are no numbers, although they are to Python.

`manifold_cl.rules` also accepts numbers of numpy, as options in Python.
"""

from __future__ import annotations

from typing import Any, TypeGuard


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number.

    >>> [is_whole(value) for value in (3, True, 3.0, "3")]
    [True, False, False, False]
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a real number, whole ones and NaN included.

    >>> [is_number(value) for value in (3, 0.5, True, "3")]
    [True, True, False, False]
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value of JSON or TOML is of this kind; for ``float``, any number is.

    >>> is_of_kind(True, int), is_of_kind(3, float), is_of_kind(True, bool)
    (False, True, True)
    """
    return is_whole(value) if kind is int else is_number(value) if kind is float else isinstance(value, kind)
