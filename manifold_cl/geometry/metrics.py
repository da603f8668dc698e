"""The Euclidean and the canonical metric of the Stiefel manifold.

A metric's gradient map is no projection: vectors are made tangent by the orthogonal projection in either metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from manifold_cl.geometry.geodesics import geodesic, log_canonical, log_euclidean
from manifold_cl.linalg import Point, Tangent, sym


@runtime_checkable
class Metric(Protocol):
    """An inner product on tangent vectors, with its gradient, Hessian and geodesics."""

    @property
    def name(self) -> str:
        """``"euclidean"`` or ``"canonical"``."""
        ...

    @property
    def radius(self) -> float:
        """A lower bound of the injectivity radius: a shorter geodesic is the only shortest one."""
        ...

    @property
    def default_retraction(self) -> str:
        """The second-order retraction of this metric."""
        ...

    def inner(self, x: Tensor, u: Tensor, v: Tensor, *, keepdim: bool = False) -> Tensor:
        """The inner product of u and v at x."""
        ...

    def lowered(self, x: Tensor, u: Tensor) -> Tensor:
        """The w with ``inner(x, u, v) = tr(wᵀv)`` for every tangent v."""
        ...

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The Riemannian gradient for the Euclidean gradient g, before the projection off F."""
        ...

    def hessian(self, x: Tensor, g: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """The Riemannian Hessian along u before the projection off F, from Euclidean g and h orthogonal to F."""
        ...

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The point at time 1 of the geodesic with velocity u."""
        ...

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The velocity of a geodesic from x to y, unchecked."""
        ...


@dataclass(frozen=True)
class EuclideanMetric:
    """``tr(uᵀv)``, inherited from the matrices. Radius: zimmermann2024injectivity."""

    name: str = "euclidean"
    radius: float = math.pi
    default_retraction: str = "polar"

    def inner(self, x: Point, u: Tangent, v: Tangent, *, keepdim: bool = False) -> Tensor:
        """``tr(uᵀv)``, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        return (u * v).sum(dim=(-2, -1), keepdim=keepdim)

    def lowered(self, x: Point, u: Tangent) -> Tangent:
        """The vector u itself."""
        return u

    def gradient(self, x: Point, g: Tangent) -> Tangent:
        """``g − x sym(xᵀg)``, which is also the tangent projection."""
        return g - x @ sym(x.mT @ g)

    def hessian(self, x: Point, g: Tangent, h: Tangent, u: Tangent) -> Tangent:
        """``Π(h − u sym(xᵀg))``. Source: absil2013extrinsic, section 4; docs/geometry.md, "Second order"."""
        return self.gradient(x, h - u @ sym(x.mT @ g))

    def exp(self, x: Point, u: Tangent) -> Point:
        """`geodesic` with twist 2."""
        return geodesic(x, u, twist=2.0)

    def log(self, x: Point, y: Point) -> Tangent:
        """`log_euclidean`."""
        return log_euclidean(x, y)


@dataclass(frozen=True)
class CanonicalMetric:
    """``tr(uᵀ(I − xxᵀ/2)v)``, inherited from the rotation group. Radius: rentmeesters2013algorithms."""

    name: str = "canonical"
    radius: float = 0.89 * math.pi
    default_retraction: str = "cayley"

    def inner(self, x: Point, u: Tangent, v: Tangent, *, keepdim: bool = False) -> Tensor:
        """``tr(uᵀv) − tr(uᵀx xᵀv)/2``, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        inside = (x.mT @ u) * (x.mT @ v)
        return (u * v).sum(dim=(-2, -1), keepdim=keepdim) - inside.sum(dim=(-2, -1), keepdim=keepdim) / 2

    def lowered(self, x: Point, u: Tangent) -> Tangent:
        """``u − x xᵀu / 2``."""
        return u - x @ (x.mT @ u) / 2

    def gradient(self, x: Point, g: Tangent) -> Tangent:
        """``g − x gᵀx``: a gradient, not a projection; on a tangent vector it doubles the rotation in span(x)."""
        return g - x @ (g.mT @ x)

    def hessian(self, x: Point, g: Tangent, h: Tangent, u: Tangent) -> Tangent:
        """``e − x eᵀx`` with ``e = h − u sym(gᵀx) − sym(n xᵀ) u`` and n the part of g outside span(x).

        Source: edelman1998geometry, section 2.4.5; docs/geometry.md, "Second order", with a protected subspace.
        """
        normal = g - x @ (x.mT @ g)
        curved = (normal @ (x.mT @ u) + x @ (normal.mT @ u)) / 2  # sym(n xᵀ) u, without an n × n matrix
        return self.gradient(x, h - u @ sym(g.mT @ x) - curved)

    def exp(self, x: Point, u: Tangent) -> Point:
        """`geodesic` with twist 1."""
        return geodesic(x, u, twist=1.0)

    def log(self, x: Point, y: Point) -> Tangent:
        """`log_canonical`."""
        return log_canonical(x, y)


METRICS: Mapping[str, Metric] = {"euclidean": EuclideanMetric(), "canonical": CanonicalMetric()}
"""The metrics by name."""
