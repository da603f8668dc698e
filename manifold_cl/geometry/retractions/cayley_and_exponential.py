"""Retractions by rotations: the Cayley transform, and the exponential maps of both metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from manifold_cl.geometry.long_steps import at_any_length
from manifold_cl.geometry.metrics import geodesic
from manifold_cl.geometry.retractions.protocol import Order, orders
from manifold_cl.linalg import Point, Square, Tangent, identity_like, split_tangent


@dataclass(frozen=True)
class Cayley:
    """``(I − W/2)⁻¹(I + W/2) x`` with the skew W = Πuxᵀ − xuᵀΠ, Π = I − xxᵀ/2, by one p × p solve.

    W maps span[x, b], b = u − xxᵀu, into itself. The n × n system reduces to ``K⁻¹ = I − A/2 + bᵀb/4`` with A = xᵀu
    skew. Its symmetric part is at least I, so it is invertible for every step.

    Source: wen2013feasible, for W; docs/geometry.md, "Retractions", for the p × p form.
    """

    name: str = "cayley"
    order: Order = field(default_factory=orders(1, 2), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``(2x + b)K − x``. O(n p²) + O(p³)."""
        _, b, k_inverse = _parts(x, u)
        # An inverse and a product: 4 times as fast as n solves, and |K| ≤ 1 loses no digits.
        k: Square = torch.linalg.inv(k_inverse)
        return (2 * x + b) @ k - x

    def inverse(self, x: Point, y: Point) -> Tangent:
        """``2y(I + xᵀy)⁻¹ + 2x(I + yᵀx)⁻¹ − 2x``, defined unless xᵀy has the eigenvalue −1."""
        w = x.mT @ y
        k: Square = torch.linalg.inv(identity_like(w) + w)
        return 2 * (y @ k + x @ k.mT - x)

    def differential(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """The derivative of ``(2x + b)K − x`` in u, in the direction v: dK = −K d(K⁻¹) K."""
        _, b, k_inverse = _parts(x, u)
        k: Square = torch.linalg.inv(k_inverse)
        da, db = split_tangent(x, v)
        cross = b.mT @ db
        return (db - (2 * x + b) @ k @ ((cross + cross.mT) / 4 - da / 2)) @ k

    def transport(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """``(I − W/2)⁻¹(I + W/2) v``: isometric in both metrics; the step back undoes it.

        Not the differential of the retraction. Source: zhu2017riemannian; docs/geometry.md, "Transport", for the
        p × p form. O(n p²) + O(p³).
        """
        a, _, k_inverse = _parts(x, u)
        inside = x.mT @ v
        c1: Square = torch.linalg.solve(k_inverse, inside - (a @ inside + u.mT @ v) / 2)
        c2 = 2 * (inside - c1) + a @ c1 / 2
        return v + (u - x @ a / 2) @ c1 - x @ c2


@dataclass(frozen=True)
class IterativeCayley:
    """The Cayley transform by fixed-point passes ``y ← x + W(x + y)/2``: no solve, approximately on the manifold.

    A pass contracts by ``|W|/2``, so a step with ``|W|_F`` above 1 is shortened to 1, as in the source (q = 1/2). The
    manifold removes the remaining error. The iterates stay in span[x, b]: a pass costs p × p operations.

    Source: li2020efficient, algorithm 1.
    """

    passes: int = 5
    name: str = "iterative_cayley"
    order: Order = field(default_factory=orders(1, 2), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``x α + b β`` after `passes` passes from the Euler step x + u; xᵀx − I is ``O(|u|⁸)``. O(n p²) + O(s p³)."""
        a, b = split_tangent(x, u)
        h = b.mT @ b
        square = a.square().sum((-2, -1), keepdim=True) + 2 * h.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        shrink = square.clamp_min(1).rsqrt()
        a, b, h = shrink * a, shrink * b, shrink.square() * h
        eye = identity_like(a)
        alpha, beta = eye + a, eye
        for _ in range(self.passes):
            alpha, beta = eye + (a @ (eye + alpha) - h @ beta) / 2, (eye + alpha) / 2
        return x @ alpha + b @ beta


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


def _parts(x: Point, u: Tangent) -> tuple[Square, Tangent, Square]:
    """A = xᵀu, b = u − xA and ``K⁻¹ = I − A/2 + bᵀb/4``."""
    a, b = split_tangent(x, u)
    return a, b, identity_like(a) - a / 2 + b.mT @ b / 4
