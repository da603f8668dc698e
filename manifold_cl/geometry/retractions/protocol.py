"""Protocols of retractions: the required members, and optional ones.

Every retraction here is one of the ordinary Stiefel manifold, of the form ``R = x a + u b`` with p × p factors that
depend on ``xᵀu`` and ``uᵀu`` only. The columns therefore stay in span[x u], and orthogonal to every subspace that is
orthogonal to x and u: a retraction does not depend on F.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

Order = Mapping[str, float | int]


@runtime_checkable
class Retraction(Protocol):
    """A map from (point, tangent vector) to a point, equal to the geodesic up to ``order`` in the step length.

    Implementations are frozen values: printable, comparable, pure, batched over leading dimensions.
    """

    @property
    def name(self) -> str:
        """The registry's name."""

    @property
    def order(self) -> Order:
        """Order by metric, such as ``{"euclidean": 2}``, ``math.inf`` for a geodesic; see `check_retraction`."""

    @property
    def self_correcting(self) -> bool:
        """Whether the result is orthonormal even if x has drifted."""

    @property
    def tangent_only(self) -> bool:
        """Whether u must be tangent."""

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """The retraction of the tangent vector u at x (…, n, p)."""


@runtime_checkable
class Summing(Retraction, Protocol):
    """A retraction that may depend on x and u only through their sum."""

    @property
    def of_sum(self) -> bool:
        """Whether it does, with an orthonormal result for every x. The manifold then projects the sum only."""


@runtime_checkable
class Scheduled(Retraction, Protocol):
    """A retraction whose result is orthonormal up to a declared length of the step only."""

    @property
    def longest(self) -> float:
        """That length. The manifold normalises results of steps above `LONG` before it projects them."""


def depends_on_sum(retraction: Retraction) -> bool:
    """Whether the result is orthogonal to F whenever the sum x + u is."""
    return isinstance(retraction, Summing) and retraction.of_sum and retraction.self_correcting


@runtime_checkable
class Invertible(Retraction, Protocol):
    """A retraction with a closed-form inverse."""

    def inverse(self, x: Tensor, y: Tensor) -> Tensor:
        """The tangent vector at x that leads to y, if one exists; `RestrictedStiefel.inverse_retr` verifies it."""


@runtime_checkable
class Differentiable(Retraction, Protocol):
    """A retraction with a closed-form derivative."""

    def differential(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``d/dt R(x, u + t v)`` at t = 0."""


@runtime_checkable
class Transporting(Retraction, Protocol):
    """A retraction with its own isometric transport, which the step back undoes."""

    def transport(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The tangent vector v carried from x to R(x, u)."""


def orders(euclidean: float | int, canonical: float | int) -> Callable[[], dict[str, float | int]]:
    """A default factory for `Retraction.order`; ``math.inf`` for the geodesic itself."""
    return lambda: {"euclidean": euclidean, "canonical": canonical}


@dataclass(frozen=True)
class FunctionRetraction:
    """A bare function ``f(x, u)`` as a retraction of declared order 1."""

    function: Callable[[Tensor, Tensor], Tensor]
    name: str = ""
    order: Order = field(default_factory=orders(1, 1), hash=False)
    self_correcting: bool = False
    tangent_only: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """``f(x, u)``; the manifold validates its shape."""
        return self.function(x, u)
