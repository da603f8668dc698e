"""A problem of the lab: a smooth cost on the restricted Stiefel manifold whose smallest value is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel


class Problem(ABC):
    """A cost on ``St(n, p; F)`` in float64, with its derivatives, its smallest value and its starts.

    A subclass gives ``name``, ``known_by``, ``p``, ``complement``, ``optimum`` and `cost`. The derivatives come from
    automatic differentiation unless it overrides them. Costs are scaled so that the largest curvature is about 1.
    """

    name: ClassVar[str]
    """A word for tables and options."""
    known_by: ClassVar[str]
    """How the optimum is known, such as ``"eigenvalues"``."""
    p: int
    """Columns of a point."""

    @property
    @abstractmethod
    def complement(self) -> Tensor:
        """The orthonormal basis F (n, k) that points are orthogonal to."""

    @property
    @abstractmethod
    def optimum(self) -> float:
        """The smallest cost on the manifold."""

    @abstractmethod
    def cost(self, x: Tensor) -> Tensor:
        """The cost at x (n, p), 0-d; defined for any matrix x, also off the manifold."""

    def gradient(self, x: Tensor) -> Tensor:
        """The Euclidean gradient of the cost at x."""
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.cost(at), at)
        return g

    def hessian(self, x: Tensor, v: Tensor) -> Tensor:
        """The derivative of the Euclidean gradient at x along v."""
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.cost(at), at, create_graph=True)
            along: Tensor = torch.autograd.grad(g, at, v)[0]
        return along

    def manifold(self, retraction: object = None) -> RestrictedStiefel:
        """The manifold with the Euclidean metric and the given retraction (``polar`` if None)."""
        return RestrictedStiefel(self.complement, retraction=retraction)  # type: ignore[arg-type]

    def start(self, seed: int) -> Tensor:
        """A point drawn uniformly from the manifold."""
        draw = torch.Generator().manual_seed(seed)
        point = self.manifold().random(len(self.complement), self.p, dtype=torch.float64, generator=draw)
        start: Tensor = point.as_subclass(Tensor).detach().clone()
        return start

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, p, k)``."""
        n, k = self.complement.shape
        return n, self.p, k
