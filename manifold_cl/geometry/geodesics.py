"""Geodesics of both metrics, as functions and as retractions, and parallel transport along the canonical ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from manifold_cl.geometry.lengths import at_any_length
from manifold_cl.geometry.retractions import Order, orders, register_retraction
from manifold_cl.linalg import Point, Square, Tangent, identity_like, matrix_exp, read_largest, split_tangent

FARTHEST = 1e4
"""Length of a step along which a vector is carried parallel: one pass per unit of it, 0.2 ms each."""
TAYLOR_TERMS = 18
"""Of an exponential at norm at most 1: the first term left out is 1/19! = 8e-18."""


def geodesic(x: Point, u: Tangent, *, twist: float) -> Point:
    """``[x b] expm([[tA, −bᵀb], [I, 0]])[:, :p] expm((1 − t)A)`` with A = xᵀu, b = u − xA and t = ``twist``.

    The point at time 1 of the geodesic with velocity u: t = 1 for the canonical metric, t = 2 for the Euclidean.
    No tall matrix is factorised. O(n p²) + O(p³).

    Source: edelman1998geometry, sections 2.2.2 and 2.4.1; zimmermann2022computing for the family.
    """
    a, b = split_tangent(x, u)
    # A similarity that balances the generator: at |b| = 1e4 its norm is then 1e4, not 1e8. No gradient belongs to it.
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


@register_retraction
@dataclass(frozen=True)
class Exponential:
    """The geodesic of the Euclidean metric itself. Source: edelman1998geometry, section 2.2.2."""

    name: str = "exponential"
    order: Order = field(default_factory=orders(math.inf, 1), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``exp_x(u)``: `geodesic` with twist 2. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=2.0)


@register_retraction
@dataclass(frozen=True)
class ExponentialCanonical:
    """The geodesic of the canonical metric itself. Source: edelman1998geometry, section 2.4.1."""

    name: str = "exponential_canonical"
    order: Order = field(default_factory=orders(1, math.inf), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``exp_x(u)``: `geodesic` with twist 1. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=1.0)


def parallel_canonical(x: Point, u: Tangent, v: Tangent) -> Tangent:
    """V carried parallel, in the canonical metric, along its geodesic from x with velocity u to time 1.

    With the generators S of u and T of v in so(n): ``eˢ exp(−ad_S / 2) T`` at the start point, ad_S followed by
    the projection onto generators of horizontal form (geometry.md 4.6). T keeps the form x d xᵀ + c xᵀ − x cᵀ
    with c = b α + b' β, where b and b' are the parts of u and v outside span(x), so the exponential acts on the
    three p × p factors (d, α, β): it is summed as a Taylor series, in steps of norm at most 1.
    O(n p²) + O(|u| p³).

    Raises:
        ValueError: for a step longer than `FARTHEST`, and where its length cannot be read (vmap, compiled).
    """
    (a, b), (d, c) = split_tangent(x, u), split_tangent(x, v)
    gram, mixed = b.mT @ b, b.mT @ c
    # |S|_F bounds |ad_S|/2 on these generators; reading it fixes the number of steps.
    length = read_largest((a.square().sum((-2, -1)) + 2 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)).detach().sqrt())
    if length is None:
        raise ValueError("parallel transport reads the length of the step, which vmap and torch.compile do not allow")
    if length > FARTHEST:
        raise ValueError(
            f"parallel transport along a step of length {length:.1e} would take as many passes: the longest is "
            f"{FARTHEST:.0e}; use transport='projection' for such steps"
        )
    steps = max(1, math.ceil(length)) if math.isfinite(length) else 1
    alpha, beta = torch.zeros_like(a), identity_like(a)

    def bracket(d: Square, alpha: Square, beta: Square) -> tuple[Square, Square, Square]:
        overlap = gram @ alpha + mixed @ beta
        return (
            (d @ a - a @ d + overlap - overlap.mT) / 2,
            (alpha @ a - d) / 2,
            beta @ a / 2,
        )

    for _ in range(steps):
        term_d, term_alpha, term_beta = d, alpha, beta
        for i in range(1, TAYLOR_TERMS + 1):
            next_d, next_alpha, next_beta = bracket(term_d, term_alpha, term_beta)
            term_d, term_alpha, term_beta = next_d / (i * steps), next_alpha / (i * steps), next_beta / (i * steps)
            d, alpha, beta = d + term_d, alpha + term_alpha, beta + term_beta
    zero, eye = torch.zeros_like(a), identity_like(a)
    generator = torch.cat(  # S in the basis [x, b, c], which it maps into itself
        [
            torch.cat([a, -gram, -mixed], dim=-1),
            torch.cat([eye, zero, zero], dim=-1),
            torch.cat([zero, zero, zero], dim=-1),
        ],
        dim=-2,
    )
    factors = matrix_exp(generator) @ torch.cat([d, alpha, beta], dim=-2)
    return torch.cat([x, b, c], dim=-1) @ factors
