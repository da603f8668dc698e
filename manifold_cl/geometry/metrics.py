"""Metrics of the Stiefel manifold: the Euclidean, the canonical, and the family that contains both; their geodesics.

A metric's gradient map is no projection: vectors are made tangent by the orthogonal projection in every metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_cl.geometry.logarithms import log_by_shooting, log_canonical
from manifold_cl.linalg import Point, Tangent, identity_like, matrix_exp, skew, split_tangent, sym
from manifold_cl.rules import validate_positive


@dataclass(frozen=True)
class EuclideanMetric:
    """``tr(uᵀv)``, inherited from the matrices.

    ``radius`` is a lower bound of the injectivity radius: a shorter geodesic is the only shortest one
    (zimmermann2024injectivity). ``default_retraction`` is of second order for this metric.
    """

    name: str = "euclidean"
    radius: float = math.pi
    default_retraction: str = "polar"
    twist: float = 2.0

    def inner(self, x: Point, u: Tangent, v: Tangent, *, keepdim: bool = False) -> Tensor:
        """``tr(uᵀv)``, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        return (u * v).sum(dim=(-2, -1), keepdim=keepdim)

    def lowered(self, x: Point, u: Tangent) -> Tangent:
        """The w with ``inner(x, u, v) = tr(wᵀv)`` for every tangent v: u itself."""
        return u

    def gradient(self, x: Point, g: Tangent) -> Tangent:
        """The gradient before the projection off F: ``g − x sym(xᵀg)``, which is also the tangent projection."""
        return g - x @ sym(x.mT @ g)

    def hessian(self, x: Point, g: Tangent, h: Tangent, u: Tangent) -> Tangent:
        """``Π(h − u sym(xᵀg))`` before the projection off F, for g and h orthogonal to F.

        Source: absil2013extrinsic, section 4; docs/geometry.md, "Second order".
        """
        return self.gradient(x, h - u @ sym(x.mT @ g))

    def log(self, x: Point, y: Point) -> Tangent:
        """The velocity of a geodesic from x to y, not verified: `log_by_shooting`."""
        return log_by_shooting(x, y, twist=self.twist)


@dataclass(frozen=True)
class CanonicalMetric:
    """``tr(uᵀ(I − xxᵀ/2)v)``, inherited from the rotation group. Radius: rentmeesters2013algorithms."""

    name: str = "canonical"
    radius: float = 0.89 * math.pi
    default_retraction: str = "cayley"
    twist: float = 1.0

    def inner(self, x: Point, u: Tangent, v: Tangent, *, keepdim: bool = False) -> Tensor:
        """``tr(uᵀv) − tr(uᵀx xᵀv)/2``, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        inside = (x.mT @ u) * (x.mT @ v)
        return (u * v).sum(dim=(-2, -1), keepdim=keepdim) - inside.sum(dim=(-2, -1), keepdim=keepdim) / 2

    def lowered(self, x: Point, u: Tangent) -> Tangent:
        """The w with ``inner(x, u, v) = tr(wᵀv)`` for every tangent v: ``u − x xᵀu / 2``."""
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

    def log(self, x: Point, y: Point) -> Tangent:
        """The velocity of a geodesic from x to y, not verified: `log_canonical`."""
        return log_canonical(x, y)


@dataclass(frozen=True)
class BetaMetric:
    """``tr(uᵀ(I − (1 − β) xxᵀ)v)``: weight β on the rotation inside span(x), weight 1 on the part outside.

    β = 1 is the Euclidean metric, β = 1/2 the canonical one; `RestrictedStiefel` replaces these two by their names.
    Geodesics are `geodesic` with twist 2β. As β falls to 0 they become the quasi-geodesics of
    `manifold_cl.geometry.retractions.QuasiGeodesic`.

    Source: huper2021lagrangian for the family; zimmermann2022computing for geodesics and logarithm; docs/geometry.md,
    "The family of metrics".

    Args:
        beta: a finite number above 0.

    Raises:
        ValueError: for any other number.

    >>> BetaMetric(0.75).radius == math.pi
    True
    """

    beta: float

    def __post_init__(self) -> None:
        validate_positive("beta, which is 1 for the Euclidean and 0.5 for the canonical metric,", self.beta)

    @property
    def name(self) -> str:
        """The name in messages and in `Retraction.order`: ``"beta_0.75"``."""
        return f"beta_{self.beta!r}"

    @property
    def twist(self) -> float:
        """``2β``, the parameter of `geodesic`."""
        return 2 * self.beta

    @property
    def radius(self) -> float:
        """A lower bound of the injectivity radius; 0 for β above 1, where we know of no proven one.

        Klingenberg's bound min(π/√K, half the shortest loop), with loops of length ``2π min(√2β, 1)`` and largest
        sectional curvature K: ``√2β π`` up to β = 1/3, ``π / √(2 − 3β/2)`` up to 2/3, and π up to 1.

        Source: stoye2025shortest for the loops, and for the exact radius outside (1/3, 2/3), half the loop;
        docs/geometry.md, "The family of metrics", for K in between.
        """
        if self.beta > 1:
            return 0.0
        return math.pi * min(math.sqrt(2 * self.beta), 1 / math.sqrt(max(2 - 1.5 * self.beta, 1)))

    def inner(self, x: Point, u: Tangent, v: Tangent, *, keepdim: bool = False) -> Tensor:
        """``tr(uᵀv) − (1 − β) tr(uᵀx xᵀv)``, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        inside = (x.mT @ u) * (x.mT @ v)
        whole = (u * v).sum(dim=(-2, -1), keepdim=keepdim)
        return whole - (1 - self.beta) * inside.sum(dim=(-2, -1), keepdim=keepdim)

    def lowered(self, x: Point, u: Tangent) -> Tangent:
        """The w with ``inner(x, u, v) = tr(wᵀv)`` for every tangent v: ``u − (1 − β) x xᵀu``."""
        return u - (1 - self.beta) * (x @ (x.mT @ u))

    def gradient(self, x: Point, g: Tangent) -> Tangent:
        """``g − x xᵀg + x skew(xᵀg) / β`` before the projection off F: a projection only for β = 1."""
        inside = x.mT @ g
        return g - x @ (inside - skew(inside) / self.beta)

    def hessian(self, x: Point, g: Tangent, h: Tangent, u: Tangent) -> Tangent:
        """The gradient of ``h − u sym(xᵀg) − (1 − β)(n xᵀu + x nᵀu)``, with n the part of g outside span(x).

        For g and h orthogonal to F. Source: docs/geometry.md, "The family of metrics", from the second derivative
        ``x(a² − bᵀb) + 2(1 − β) b a`` of a geodesic with a = xᵀu and b = u − xa.
        """
        normal = g - x @ (x.mT @ g)
        curved = normal @ (x.mT @ u) + x @ (normal.mT @ u)
        return self.gradient(x, h - u @ sym(x.mT @ g) - (1 - self.beta) * curved)

    def log(self, x: Point, y: Point) -> Tangent:
        """The velocity of a geodesic from x to y, not verified: `log_by_shooting`."""
        return log_by_shooting(x, y, twist=self.twist)


Metric = EuclideanMetric | CanonicalMetric | BetaMetric
MetricChoice = Literal["euclidean", "canonical"] | BetaMetric
"""A metric as an argument: a name, or a member of the family."""
METRICS: Mapping[str, EuclideanMetric | CanonicalMetric] = {
    "euclidean": EuclideanMetric(),
    "canonical": CanonicalMetric(),
}
"""The metrics that have a name."""
NAMED = {1.0: "euclidean", 0.5: "canonical"}
"""Members of the family that have a name."""


def normalised_metric(choice: Any) -> Any:
    """The name of a metric if it has one, else the `BetaMetric`; ValueError for anything else."""
    if isinstance(choice, BetaMetric):
        return NAMED.get(choice.beta, choice)
    if not isinstance(choice, str) or choice not in METRICS:
        raise ValueError(
            f"metric is one of {', '.join(METRICS)}, got {choice!r}; the family around them is BetaMetric(beta)"
        )
    return choice


def as_metric(choice: str | BetaMetric) -> Metric:
    """The metric of a name or of a member of the family."""
    return choice if isinstance(choice, BetaMetric) else METRICS[choice]


def geodesic(x: Point, u: Tangent, *, twist: float) -> Point:
    """The point at time 1 of the geodesic with velocity u.

    Computes ``[x b] expm([[tA, −bᵀb], [I, 0]])[:, :p] expm((1 − t)A)`` with A = xᵀu, b = u − xA and t = ``twist``: 1 in
    the canonical metric, 2 in the Euclidean, 2β in `BetaMetric`. No tall matrix is factorised. O(n p²) + O(p³).

    Source: edelman1998geometry, sections 2.2.2 and 2.4.1; zimmermann2022computing for the family.
    """
    a, b = split_tangent(x, u)
    # A similarity that balances the generator: at |b| = 1e4 its norm is then 1e4, not 1e8. A constant for autograd.
    size = torch.linalg.matrix_norm(b.detach(), keepdim=True).clamp_min(1)
    eye = identity_like(a)
    top = torch.cat([twist * a, b.mT @ b / -size], dim=-1)
    bottom = torch.cat([size * eye, torch.zeros_like(a)], dim=-1)
    p = x.shape[-1]
    factors = matrix_exp(torch.cat([top, bottom], dim=-2))[..., :p]
    if twist != 1:
        factors = factors @ matrix_exp((1 - twist) * a)
    point: Point = x @ factors[..., :p, :] + b @ (factors[..., p:, :] / size)
    return point
