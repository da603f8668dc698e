"""Methods: one file per method and its variants, and the registry of them all."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from manifold_cl.continual.method import Method
from manifold_cl.continual.methods.eblora import Balanced, EBLoRA, Restricted
from manifold_cl.continual.methods.gpm import GPM
from manifold_cl.continual.methods.inflora import InfLoRA
from manifold_cl.continual.methods.joint import Joint, ZeroShot
from manifold_cl.continual.methods.keeplora import KeepLoRA
from manifold_cl.continual.methods.olora import OLoRA
from manifold_cl.continual.methods.sequential import Sequential, SequentialMerge
from manifold_cl.continual.methods.stella_merge import StellaMerge
from manifold_cl.continual.methods.svd_eq import SVDEq
from manifold_cl.plugins import Registry, unknown


def _prepare(candidate: Any) -> tuple[str, type[Method]]:
    if not (isinstance(candidate, type) and issubclass(candidate, Method)):
        raise TypeError(f"a method is a subclass of Method, got {candidate!r}")
    return candidate.name, candidate


METHODS: Registry[type[Method]] = Registry("method", _prepare)
"""Method classes by name, those of installed packages too (read-only; see `register_method`)."""

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
    *(Balanced, EBLoRA, GPM, InfLoRA, Joint, KeepLoRA, OLoRA),
    *(Restricted, Sequential, SequentialMerge, StellaMerge, SVDEq, ZeroShot),
):
    METHODS.register(_cls)


def make_method(name: str, **options: Any) -> Method:
    """A method by name with options.

    Raises:
        ValueError: for an unknown name or option, with the nearest ones, or a value out of range.
        TypeError: for an option whose value is of the wrong kind.
    """
    names = [field.name for field in fields(METHODS[name]) if field.init]  # type: ignore[arg-type]
    if others := [option for option in options if option not in names]:
        raise ValueError(unknown(f"option of {name}", others[0], names))
    return METHODS[name](**options)
