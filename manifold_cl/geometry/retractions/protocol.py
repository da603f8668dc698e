"""The protocols of retractions: what one has, and what it may have in addition.

A retraction here is one of the ordinary Stiefel manifold. Each has the form ``R = x a + u b`` with
p × p factors that depend on ``xᵀu`` and ``uᵀu`` only, so the columns stay in span[x u] and with them in
the complement of every subspace that x and u avoid: no retraction needs to know what is protected.

The family itself lives in `projective` (QR and polar), `cayley` and `geodesics`. Beyond the protocol a retraction
may have ``inverse(x, y)``, ``differential(x, u, v)``, ``transport(x, u, v)`` and ``of_sum``; see `Invertible`,
`Differentiable`, `Transporting` and `Summing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

Order = Mapping[str, float | int]


@runtime_checkable
class Retraction(Protocol):
    """A map from (point, tangent vector) to a point that agrees with the geodesic to ``order`` in the step.

    Implementations are frozen values: printable, comparable, pure, batched over leading dimensions.
    """

    @property
    def name(self) -> str:
        """The registry's name."""
        ...

    @property
    def order(self) -> Order:
        """Order by metric, such as ``{"euclidean": 2}``, ``math.inf`` for a geodesic; see `check_retraction`."""
        ...

    @property
    def self_correcting(self) -> bool:
        """Whether the result is orthonormal even where x has drifted."""
        ...

    @property
    def tangent_only(self) -> bool:
        """Whether a vector that is not tangent may break it."""
        ...

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """The point reached from x (…, n, p) by the tangent vector u."""
        ...


@runtime_checkable
class Summing(Retraction, Protocol):
    """A retraction that may depend on x and u through their sum alone."""

    @property
    def of_sum(self) -> bool:
        """Whether it does, and is orthonormal whatever x is: the manifold then cleans the sum instead of the result."""
        ...


def sums(retraction: Retraction) -> bool:
    """Whether a point off F needs no more than a sum x + u off F."""
    return isinstance(retraction, Summing) and retraction.of_sum and retraction.self_correcting


@runtime_checkable
class Invertible(Retraction, Protocol):
    """A retraction with a closed-form inverse."""

    def inverse(self, x: Tensor, y: Tensor) -> Tensor:
        """The tangent vector at x that leads to y, where there is one; `RestrictedStiefel.inverse_retr` checks."""
        ...


@runtime_checkable
class Differentiable(Retraction, Protocol):
    """A retraction whose derivative is known in closed form."""

    def differential(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``d/dt R(x, u + t v)`` at t = 0."""
        ...


@runtime_checkable
class Transporting(Retraction, Protocol):
    """A retraction with an isometric transport of its own, undone by retracting back."""

    def transport(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The tangent vector v carried from x to R(x, u)."""
        ...


def orders(euclidean: float | int, canonical: float | int) -> Callable[[], dict[str, float | int]]:
    """A default factory for `Retraction.order`; ``math.inf`` stands for the geodesic itself."""
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
        """``f(x, u)``, whatever its shape: the manifold checks it."""
        return self.function(x, u)
