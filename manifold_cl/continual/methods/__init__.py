"""Methods: one file per method, and the registry of them all."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from manifold_cl.continual.method import Method
from manifold_cl.continual.methods.balanced import Balanced
from manifold_cl.continual.methods.eblora import EBLoRA
from manifold_cl.continual.methods.gpm import GPM
from manifold_cl.continual.methods.inflora import InfLoRA
from manifold_cl.continual.methods.joint import Joint
from manifold_cl.continual.methods.keeplora import KeepLoRA
from manifold_cl.continual.methods.olora import OLoRA
from manifold_cl.continual.methods.restricted import Restricted
from manifold_cl.continual.methods.sequential import Sequential
from manifold_cl.continual.methods.sequential_merge import SequentialMerge
from manifold_cl.continual.methods.stella_merge import StellaMerge
from manifold_cl.continual.methods.svd_eq import SVDEq
from manifold_cl.continual.methods.zero_shot import ZeroShot
from manifold_cl.plugins import Registry, unknown

__all__ = [
    "GPM",
    "METHODS",
    "Balanced",
    "EBLoRA",
    "InfLoRA",
    "Joint",
    "KeepLoRA",
    "OLoRA",
    "Restricted",
    "SVDEq",
    "Sequential",
    "SequentialMerge",
    "StellaMerge",
    "ZeroShot",
    "make_method",
    "register_method",
]


def _prepare(candidate: Any) -> tuple[str, type[Method]]:
    """The name of a method class, and the class."""
    if not (isinstance(candidate, type) and issubclass(candidate, Method)):
        raise TypeError(f"a method is a subclass of Method, got {candidate!r}")
    return candidate.name, candidate


METHODS: Registry[type[Method]] = Registry("method", _prepare)
"""Method classes by name, those of installed packages too (read-only; see `register_method`)."""

KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
}
"""What an option takes and what that is called, by the kind of its default; others take anything."""

_M = TypeVar("_M", bound=type[Method])


def register_method(cls: _M) -> _M:
    """Class decorator: put a method into `METHODS` under its ``name``.

    An installed package offers its class as an entry point of the group ``manifold_cl.methods`` instead.

    Raises:
        ValueError: when the name is taken.
        TypeError: when the class is no `Method`.
    """
    METHODS.register(cls)
    return cls


for _cls in (
    Balanced,
    EBLoRA,
    GPM,
    InfLoRA,
    Joint,
    KeepLoRA,
    OLoRA,
    Restricted,
    Sequential,
    SequentialMerge,
    StellaMerge,
    SVDEq,
    ZeroShot,
):
    register_method(_cls)


def make_method(name: str, **options: Any) -> Method:
    """A method by name with options.

    Raises:
        ValueError: for an unknown name or option, with the nearest ones.
        TypeError: for an option whose value is not of the kind of its default.
    """
    cls = METHODS[name]
    defaults = {field.name: field.default for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in defaults:
            raise ValueError(unknown(f"option of {name}", option, defaults))
        accepted, kind = KINDS.get(type(defaults[option]), (object, ""))
        is_flag = isinstance(value, bool) and accepted not in (bool, object)  # Python counts True as a number
        if is_flag or not isinstance(value, accepted):
            raise TypeError(f"option {option} of {name} is {kind} such as {defaults[option]!r}, got {value!r}")
    return cls(**options)
