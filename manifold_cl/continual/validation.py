"""Validation of options and names where they enter, by the rules of `manifold_cl.rules` and their combinations.

Every rule raises `TypeError` for a value of the wrong kind and `ValueError` for one out of range, with name and value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

from manifold_cl.rules import validate_text

_T = TypeVar("_T")
Rule = Callable[[str, Any], object]
"""Called with the name and the value of an option; raises where the value breaks the rule."""

LONGEST = 100
"""Bytes of a name that becomes part of a file's name: two names and a seed fit into the 255 of a file system."""


def option(default: _T, rule: Rule) -> _T:
    """A dataclass field with a default and a rule for `validate_options`; another default in a subclass keeps it."""
    result: _T = field(default=default, metadata={"rule": rule})
    return result


def validate_options(options: Any) -> None:
    """Refuse a dataclass with a field whose value breaks its rule; without a rule, of another kind than its default."""
    for one in fields(options):
        if one.init:
            rule = _rule(type(options), one.name) or _kind_rule(one.default)
            rule(one.name, getattr(options, one.name))


def one_of(*choices: str) -> Rule:
    """The rule that a value is one of the choices."""

    def validate_choice(name: str, value: Any) -> None:
        validate_text(name, value)
        if value not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}")

    return validate_choice


def each(rule: Rule) -> Rule:
    """The rule for one value or for every entry of a tuple."""
    return lambda name, value: [rule(name, one) for one in (value if isinstance(value, tuple) else (value,))]


def unless_none(rule: Rule) -> Rule:
    """The rule for an option that may also be None."""
    return lambda name, value: None if value is None else rule(name, value)


def validate_name(kind: str, name: Any) -> None:
    """Refuse the name of a ``kind`` that cannot be part of a folder's name, or would lead out of its folder."""
    validate_text(f"the name of a {kind}", name)
    if not name.strip() or name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError(
            f"the name of a {kind} is part of a folder's name, so it has no / or \\ or control character in it and is "
            f"not empty, '.' or '..', got {name!r}"
        )
    if (size := len(name.encode())) > LONGEST:
        start = f"the name of a {kind} is part of a folder's name and"
        raise ValueError(f"{start} has at most {LONGEST} bytes, got {size}: {name[:40]!r}…")


def _rule(cls: type, name: str) -> Rule | None:
    declared = (vars(base).get("__dataclass_fields__", {}).get(name) for base in cls.__mro__)
    return next((one.metadata["rule"] for one in declared if one is not None and "rule" in one.metadata), None)


def _kind_rule(default: Any) -> Rule:
    """The rule that a value is of the kind of the default; any value where the default is no plain value."""
    accepted, kind = KINDS.get(type(default), (object, ""))

    def validate_kind(name: str, value: Any) -> None:
        is_flag = isinstance(value, bool) and accepted not in (bool, object)  # Python counts True as a number
        if is_flag or not isinstance(value, accepted):
            raise TypeError(f"{name} is {kind} such as {default!r}, got {value!r}")

    return validate_kind


KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
}
"""The values that an option accepts by the type of its default, and their kind in words."""
