"""Vector transports along a retraction.

``projection``: onto the tangent space at the end; always available, shortens vectors a little.
``differentiated``: the derivative of the retraction; the default of the Cayley retractions.
``isometric``: the retraction's own (`Transporting`); keeps lengths, and the step back undoes it.
``parallel``: of the canonical metric along its geodesics; keeps its lengths, and the step back undoes it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from manifold_cl.geometry.metrics import BetaMetric, as_metric
from manifold_cl.geometry.retractions import (
    RETRACTIONS,
    Cayley,
    CayleyNeumann,
    Differentiable,
    ExponentialBeta,
    ExponentialCanonical,
    IterativeCayley,
    Polar,
    Retraction,
    Transporting,
)
from manifold_cl.linalg import Point, Square, Tangent, identity_like, matrix_exp, read_largest, split_tangent

TRANSPORTS = ("projection", "differentiated", "isometric", "parallel")
REVERSIBLE = ("isometric", "parallel")
"""Transports that the step back with the carried vector undoes, as geoopt's samplers require."""

FARTHEST = 1e4
"""Longest step of a parallel transport; it takes one pass per unit of length, 0.2 ms each."""
TAYLOR_TERMS = 18
"""Terms of the exponential at norm at most 1; the first omitted term is 1/19! = 8e-18."""


def default_retraction(metric: str | BetaMetric, transport: str | None) -> str | ExponentialBeta:
    """The retraction that the transport needs, else that of the metric: the geodesic for a `BetaMetric`."""
    needed = {"isometric": "cayley", "parallel": "exponential_canonical"}
    if transport in needed:
        return needed[transport]
    space = as_metric(metric)
    return ExponentialBeta(space.beta) if isinstance(space, BetaMetric) else space.default_retraction


def default_transport(retraction: Retraction) -> str:
    """``"differentiated"`` for the Cayley retractions (docs/geometry.md, "Transport"), else ``"projection"``."""
    return "differentiated" if isinstance(retraction, Cayley | IterativeCayley | CayleyNeumann) else "projection"


def validate_transport(transport: str, retraction: Retraction, metric: str | BetaMetric) -> None:
    """Refuse an unknown transport, and one that does not fit the retraction or metric."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport is one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if transport == "isometric" and not isinstance(retraction, Transporting):
        have = ", ".join(name for name, rule in sorted(RETRACTIONS.items()) if isinstance(rule, Transporting))
        raise ValueError(f"transport='isometric' needs a retraction that has one ({have}), got {retraction.name!r}")
    if transport == "parallel" and (metric != "canonical" or not isinstance(retraction, ExponentialCanonical)):
        raise ValueError(
            "parallel transport follows the geodesics of the canonical metric: it needs metric='canonical' and "
            f"retraction='exponential_canonical', got {metric!r} and {retraction.name!r}"
        )


def carry(transport: str, retraction: Retraction, x: Point, u: Tangent, v: Tangent) -> Tangent:
    """The vector v carried from x along the retraction curve of u, before the projection onto the tangent space."""
    if transport == "parallel":
        return parallel_canonical(x, u, v)
    if transport == "isometric" and isinstance(retraction, Transporting):
        return retraction.transport(x, u, v)
    if transport == "differentiated":
        return differential(retraction, x, u, v)
    return v


def differential(retraction: Retraction, x: Point, u: Tangent, v: Tangent) -> Tangent:
    """``d/dt R(x, u + t v)`` at t = 0: the retraction's closed form, or forward-mode differentiation of its code.

    The second includes the manifold's normalisation of a retraction that is not ``self_correcting``.
    """
    if isinstance(retraction, Differentiable):
        return retraction.differential(x, u, v)
    reached = torch.func.jvp(lambda step: retraction(x, step), (u,), (v,))
    y, derivative = cast(Tensor, reached[0]), cast(Tensor, reached[1])
    return derivative if retraction.self_correcting else Polar().differential(y, torch.zeros_like(y), derivative)


def parallel_canonical(x: Point, u: Tangent, v: Tangent) -> Tangent:
    """The parallel transport of v, in the canonical metric, along the geodesic from x with velocity u to time 1.

    With the generators S of u and T of v in so(n), it is ``eˢ exp(−ad_S / 2) T`` at x, where ad_S is followed by the
    projection onto generators of horizontal form (docs/geometry.md, "Transport"). T keeps the form
    x d xᵀ + c xᵀ − x cᵀ with c = b α + b' β, where b and b' are the parts of u and v outside span(x). The exponential
    therefore acts on (d, α, β). It is summed as a Taylor series in steps of norm at most 1. O(n p²) + O(|u| p³).
    ValueError for a step longer than `FARTHEST`, and when its length cannot be read (vmap, compiled).
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
        return (d @ a - a @ d + overlap - overlap.mT) / 2, (alpha @ a - d) / 2, beta @ a / 2

    for _ in range(steps):
        terms: tuple[Square, ...] = (d, alpha, beta)
        for i in range(1, TAYLOR_TERMS + 1):
            terms = tuple(part / (i * steps) for part in bracket(*terms))
            d, alpha, beta = d + terms[0], alpha + terms[1], beta + terms[2]
    zero, eye = torch.zeros_like(a), identity_like(a)
    blocks = [a, -gram, -mixed], [eye, zero, zero], [zero, zero, zero]
    # S in the basis [x, b, c], which it maps into itself
    generator = torch.cat([torch.cat(row, dim=-1) for row in blocks], dim=-2)
    factors = matrix_exp(generator) @ torch.cat([d, alpha, beta], dim=-2)
    return torch.cat([x, b, c], dim=-1) @ factors
