"""The Newton direction of second-order landing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manifold_cl.infeasible.steps import level_part, newton_schulz_part
from manifold_cl.linalg import Basis, Point, Tangent, gram, project_out, sym


def newton_direction(
    x: Point,
    g: Tensor,
    hessian: Callable[[Tensor], Tensor],
    *,
    complement: Basis | None = None,
    tolerance: float = 1e-12,
    iterations: int | None = None,
) -> Tangent:
    """The displacement u for `SecondOrderLanding`: Newton's tangent step, corrected for the normal step beside it.

    Solves ``Π(H[u] − u Λ) = −Π(g + H[n] − n Λ)`` on the tangent space of the level set, by conjugate gradients, with
    the normal step ``n = x(I − xᵀx)/2``, the multiplier ``Λ = sym(xᵀg)`` and Π the projection of the displacement.
    The equation is derived here from the Lagrangian ``f − tr Λ(xᵀx − I)/2``; the source states one of this kind.

    Args:
        x: one matrix (n, p) near the manifold.
        g: its Euclidean gradient (n, p).
        hessian: the Euclidean Hessian at x times a matrix (n, p).
        complement: orthonormal F (n, k) with ``Fᵀx = 0``.
        tolerance: residual, relative to the right side, at which to stop.
        iterations: at most this many products with the Hessian; as many as entries of x if not given.

    Returns:
        The solution; where curvature is not positive, what was reached before, or minus the tangent part of g.

    Source: xiong2026second for the method. O(n p (k + p)) and one product with the Hessian per iteration.
    """

    def tangent(v: Tensor) -> Tensor:
        part = level_part(x, v)
        return part if complement is None else project_out(part, complement)

    multiplier, normal = sym(gram(x, g)), newton_schulz_part(x)

    def curved(v: Tensor) -> Tensor:
        return tangent(hessian(v) - v @ multiplier)

    residual = -tangent(g + hessian(normal) - normal @ multiplier)
    total, direction = torch.zeros_like(x), residual
    size = start = residual.square().sum()
    for _ in range(x.numel() if iterations is None else iterations):
        if not bool(size > tolerance**2 * start):
            break
        image = curved(direction)
        curvature = (direction * image).sum()
        if not bool(curvature > 0):
            return total if bool(total.any()) else -tangent(g)
        total = total + size / curvature * direction
        residual = residual - size / curvature * image
        size, before = residual.square().sum(), size
        direction = residual + size / before * direction
    return total
