"""Retractions, which turn a tangent step into a point: the protocol, the family, and the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from manifold_cl.geometry.retractions.cayley_and_exponential import (
    Cayley,
    Exponential,
    ExponentialCanonical,
    IterativeCayley,
)
from manifold_cl.geometry.retractions.protocol import (
    Differentiable,
    FunctionRetraction,
    Invertible,
    Order,
    Retraction,
    Summing,
    Transporting,
)
from manifold_cl.geometry.retractions.qr_and_polar import QR, CholeskyQR, Polar, PolarLight, PolarSVD
from manifold_cl.plugins import Registry

__all__ = [
    "QR",
    "RETRACTIONS",
    "Cayley",
    "CholeskyQR",
    "Differentiable",
    "Exponential",
    "ExponentialCanonical",
    "FunctionRetraction",
    "Invertible",
    "IterativeCayley",
    "Order",
    "Polar",
    "PolarLight",
    "PolarSVD",
    "Retraction",
    "Summing",
    "Transporting",
    "as_retraction",
    "register_retraction",
]


def _prepare(candidate: Any) -> tuple[str, Retraction]:
    instance = candidate() if isinstance(candidate, type) else candidate
    if not isinstance(instance, Retraction):
        called = getattr(candidate, "__name__", type(candidate).__name__)
        raise TypeError(f"{called} needs name, order, self_correcting, tangent_only and __call__(x, u)")
    return instance.name, instance


RETRACTIONS: Registry[Retraction] = Registry("retraction", _prepare)
"""Retractions by name, those of installed packages too (read-only; see `register_retraction`)."""

_R = TypeVar("_R", bound=type)


def register_retraction(cls: _R) -> _R:
    """Class decorator: put an instance, made without arguments, into `RETRACTIONS`.

    An installed package offers its class as an entry point of the group ``manifold_cl.retractions`` instead.

    Raises:
        ValueError: when the name is taken.
        TypeError: when the instance lacks part of the `Retraction` protocol.
    """
    RETRACTIONS.register(cls)
    return cls


for _cls in (Cayley, IterativeCayley, Exponential, ExponentialCanonical, Polar, PolarSVD, QR, CholeskyQR, PolarLight):
    register_retraction(_cls)


def as_retraction(choice: Retraction | str | Callable[[Tensor, Tensor], Tensor]) -> Retraction:
    """The retraction for a name, an object, or a function ``f(x, u)``, which is assumed to be of first order.

    Raises:
        ValueError: for an unknown name, with the nearest ones.
        TypeError: for anything that cannot be called.
    """
    if isinstance(choice, str):
        return RETRACTIONS[choice]
    if isinstance(choice, Retraction):
        return choice
    if callable(choice):
        return FunctionRetraction(choice)
    raise TypeError(f"a retraction is a name, a Retraction or a function of (x, u), got {type(choice).__name__}")
