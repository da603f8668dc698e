"""Retractions by matrix exponentials: the geodesics of every metric, and the quasi-geodesic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from manifold_cl.geometry.arguments import of_one_shape
from manifold_cl.geometry.long_steps import at_any_length
from manifold_cl.geometry.metrics import NAMED, BetaMetric, geodesic
from manifold_cl.geometry.retractions.protocol import Order, orders
from manifold_cl.linalg import Point, Tangent, log_orthogonal, project_out


@dataclass(frozen=True)
class Exponential:
    """The geodesic of the Euclidean metric. Source: edelman1998geometry, section 2.2.2."""

    name: str = "exponential"
    order: Order = field(default_factory=orders(math.inf, 1), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``exp_x(u)``: `geodesic` with twist 2. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=2.0)


@dataclass(frozen=True)
class ExponentialCanonical:
    """The geodesic of the canonical metric. Source: edelman1998geometry, section 2.4.1."""

    name: str = "exponential_canonical"
    order: Order = field(default_factory=orders(1, math.inf), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``exp_x(u)``: `geodesic` with twist 1. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=1.0)


@dataclass(frozen=True)
class ExponentialBeta:
    """The geodesic of `BetaMetric`. Source: zimmermann2022computing; docs/geometry.md, "The family of metrics".

    Args:
        beta: the parameter of the metric, a finite number above 0.

    Raises:
        ValueError: for any other number.
    """

    beta: float
    name: str = field(init=False, default="")
    order: Order = field(init=False, default_factory=orders(1, 1), hash=False)
    self_correcting: bool = field(init=False, default=False)
    tangent_only: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        metric = BetaMetric(self.beta)
        object.__setattr__(self, "name", f"exponential_{metric.name}")
        exact = {NAMED.get(self.beta, metric.name): math.inf}
        object.__setattr__(self, "order", orders(1, 1)() | exact)

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``exp_x(u)``: `geodesic` with twist 2β. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=2 * self.beta)


@dataclass(frozen=True)
class QuasiGeodesic:
    """``(x cos h + b h⁻¹ sin h) eᴬ`` with A = xᵀu, b = u − xA and h = (bᵀb)^(1/2): rotates outwards, then inside.

    A geodesic of subspaces, turned by the rotation eᴬ inside. Of first order in every `BetaMetric`: its acceleration
    at 0 lacks the part 2β bA of theirs. It is the limit of their geodesics as β falls to 0.

    Source: bendokat2021efficient, who define quasi-geodesics by constant speed and a covariant acceleration of constant
    length, and jensen2026polar, who mention a first-order retraction of this kind with a closed-form inverse. The
    formulas of curve and inverse are our own derivation. The tests verify both properties, the order and the inverse.
    """

    name: str = "quasi_geodesic"
    order: Order = field(default_factory=orders(1, 1), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``(x cos h + b h⁻¹ sin h) eᴬ``: `geodesic` with twist 0. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=0.0)

    @of_one_shape
    def inverse(self, x: Point, y: Point) -> Tangent:
        """``x log w + b`` where xᵀy = (l cos(h) lᵀ) w is the polar decomposition, by one p × p SVD.

        Column i of ``(y − x xᵀy) wᵀ l`` has length sin(h_i), and is scaled to length h_i in b. Unique for all angles
        h below π/2 and angles of w below π.
        """
        left, cosine, right = torch.linalg.svd(x.mT @ y)
        w = left @ right
        sines = project_out(y, x) @ (w.mT @ left)
        sine = torch.linalg.vector_norm(sines, dim=-2)
        scale = torch.where(sine > 0, torch.atan2(sine, cosine) / sine, 1.0)
        step: Tangent = x @ log_orthogonal(w) + (sines * scale.unsqueeze(-2)) @ left.mT
        return step
