"""The protocol of a step without a retraction.

Every step here has the form ``y = x a + d b`` with p × p factors. Its columns therefore stay in span[x d], and
orthogonal to every subspace that is orthogonal to x and d: a step does not depend on F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from manifold_cl.linalg import Point


@runtime_checkable
class InfeasibleStep(Protocol):
    """A map from (point, displacement, rate) to a matrix near the manifold. A frozen value: pure, batched."""

    @property
    def name(self) -> str:
        """The registry's name."""

    @property
    def order(self) -> int:
        """Order of ``|yᵀy − I|`` in the length of the displacement, from a point on the manifold."""

    def __call__(self, x: Point, d: Tensor, *, lr: float | Tensor) -> Tensor:
        """The matrix after the displacement d at x (…, n, p); ``lr`` is the rate that d was made with."""


@dataclass(frozen=True)
class FunctionStep:
    """A bare function ``f(x, d, lr=...)`` as a step of declared order 2."""

    function: Callable[..., Tensor]
    order: int = 2

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, x: Point, d: Tensor, *, lr: float | Tensor) -> Tensor:
        """``f(x, d, lr=lr)``."""
        return self.function(x, d, lr=lr)
