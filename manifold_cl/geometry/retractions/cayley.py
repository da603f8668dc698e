"""The Cayley transform: by one p × p solve, by fixed-point passes, and by a Neumann series."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from manifold_cl.geometry.arguments import of_one_shape
from manifold_cl.geometry.long_steps import at_any_length
from manifold_cl.geometry.retractions.protocol import Order, orders
from manifold_cl.linalg import Point, Square, Tangent, identity_like, split_tangent
from manifold_cl.rules import validate_whole


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

    @of_one_shape
    def inverse(self, x: Point, y: Point) -> Tangent:
        """``2y(I + xᵀy)⁻¹ + 2x(I + yᵀx)⁻¹ − 2x``, defined unless xᵀy has the eigenvalue −1."""
        w = x.mT @ y
        k: Square = torch.linalg.inv(identity_like(w) + w)
        return 2 * (y @ k + x @ k.mT - x)

    @of_one_shape
    def differential(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """The derivative of ``(2x + b)K − x`` in u, in the direction v: dK = −K d(K⁻¹) K."""
        _, b, k_inverse = _parts(x, u)
        k: Square = torch.linalg.inv(k_inverse)
        da, db = split_tangent(x, v)
        cross = b.mT @ db
        return (db - (2 * x + b) @ k @ ((cross + cross.mT) / 4 - da / 2)) @ k

    @of_one_shape
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
        a, b, h = _contracted(x, u)
        eye = identity_like(a)
        alpha, beta = eye + a, eye
        for _ in range(self.passes):
            alpha, beta = eye + (a @ (eye + alpha) - h @ beta) / 2, (eye + alpha) / 2
        return x @ alpha + b @ beta


@dataclass(frozen=True)
class CayleyNeumann:
    """The Cayley transform with a truncated Neumann series: ``(I + Q)(I + Q + … + Qᵏ) x`` with Q = W/2, k = ``terms``.

    Equals the Cayley transform of ``x − Qᵏ⁺¹x``, so that it agrees with it up to order k in the step. Its error in
    xᵀx − I is ``O(|u|ᵏ⁺¹)`` for odd k and only ``O(|u|²ᵏ⁺²)`` for even k. The manifold removes it. The series needs
    ``|Q| < 1``: a step with ``|W|_F`` above 1 is shortened to 1, as in `IterativeCayley`.

    Source: qiu2025poet, for the series; docs/geometry.md, "Retractions", for the p × p form.

    Args:
        terms: k, at least 1.

    Raises:
        ValueError: for fewer terms.

    >>> CayleyNeumann(3).name
    'cayley_neumann_3'
    """

    terms: int = 4
    name: str = field(init=False, default="")
    order: Order = field(init=False, default_factory=orders(1, 2), hash=False)
    self_correcting: bool = field(init=False, default=False)
    tangent_only: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        validate_whole("terms, their number in a truncated Neumann series,", self.terms)
        object.__setattr__(self, "name", f"cayley_neumann_{self.terms}")
        object.__setattr__(self, "order", orders(1, min(self.terms, 2))())

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``(I + Q)(I + Q + … + Qᵏ) x`` by Horner's rule in span[x, b]; no solve. O(n p²) + O(k p³)."""
        a, b, h = _contracted(x, u)
        eye = identity_like(a)
        alpha, beta = eye, torch.zeros_like(a)
        for _ in range(self.terms):  # s ← x + Q s, from s = x
            alpha, beta = eye + (a @ alpha - h @ beta) / 2, alpha / 2
        alpha, beta = alpha + (a @ alpha - h @ beta) / 2, beta + alpha / 2  # (I + Q) s
        return x @ alpha + b @ beta


CAYLEY_NEUMANN_4 = CayleyNeumann(4)
"""The registered member: an even number of terms, whose result is nearly orthonormal."""


def _contracted(x: Point, u: Tangent) -> tuple[Square, Tangent, Square]:
    """A = xᵀu, b = u − xA and bᵀb of the step, shortened to ``|W|_F ≤ 1``."""
    a, b = split_tangent(x, u)
    h = b.mT @ b
    square = a.square().sum((-2, -1), keepdim=True) + 2 * h.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    shrink = square.clamp_min(1).rsqrt()
    return shrink * a, shrink * b, shrink.square() * h


def _parts(x: Point, u: Tangent) -> tuple[Square, Tangent, Square]:
    """A = xᵀu, b = u − xA and ``K⁻¹ = I − A/2 + bᵀb/4``."""
    a, b = split_tangent(x, u)
    return a, b, identity_like(a) - a / 2 + b.mT @ b / 4
