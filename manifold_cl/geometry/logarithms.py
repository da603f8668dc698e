"""Logarithms of the Stiefel manifold: the velocity of a geodesic between two points.

They reduce the problem to 2p × 2p matrices in the basis [x q], where q spans the part of y outside span(x), and iterate
there, batched. They work in float64 and guarantee neither convergence nor the shortest geodesic: `distances` verifies
both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_cl.linalg import (
    Point,
    Tangent,
    log_orthogonal,
    matrix_exp,
    project_out,
    skew,
    sym,
)

CANONICAL_PASSES = 100
SHOOTING_PASSES = 400
"""Limits, reached only by iterations that fail. Inside the radii at most 9 passes of the first were measured, and 180
of the second."""
GRID = 5
"""Points of the curve through which the shooting error is transported back."""
TINY = 1e-300
"""Avoids a division by zero for a zero vector."""
ROUNDING = 20 * 2.0**-52
"""Error per column at which an iteration in float64 has converged: roundings of sums of 2p products."""


def log_canonical(x: Point, y: Point) -> Tangent:
    """The velocity of a canonical geodesic from x to y at time 1.

    Extends the coordinates [m; n] of y to a rotation V and turns its free columns until the lower right block C of
    log V vanishes; each turn solves ``s g + g s = C`` with s = bbᵀ/12 − I/2.

    Source: zimmermann2017matrix, algorithm 3.1; zimmermann2022computing for the turn. O(n p²) + 9 O(p³) typically.
    """
    m, n, q = _coordinates(x, y)
    p = m.shape[-1]
    full = torch.linalg.qr(torch.cat([m, n], dim=-2), mode="complete")[0]
    fixed = torch.cat([m, n], dim=-2)
    # Make the lower right block symmetric and nearest to I among rotations. If a reflection is needed, reflect the
    # direction of the smallest singular value, since any other leads to an angle near π.
    left, _, right = torch.linalg.svd(full[..., p:, p:])
    proper = torch.linalg.det(torch.cat([fixed, full[..., p:] @ right.mT @ left.mT], dim=-1)).sign()
    mirror = torch.where(torch.arange(p, device=m.device) < p - 1, 1.0, proper.unsqueeze(-1))
    free = full[..., p:] @ (right.mT * mirror.unsqueeze(-2)) @ left.mT
    for _ in range(CANONICAL_PASSES):
        generator = log_orthogonal(torch.cat([fixed, free], dim=-1))
        c, b = generator[..., p:, p:], generator[..., p:, :p]
        if not bool(generator.isfinite().all()) or float(_norm(c).amax()) < p * ROUNDING:
            break
        spectrum, vectors = torch.linalg.eigh(b @ b.mT / 12)
        # Inside the radius b_i² + b_j² < 7.9, so the sums are below −0.3; beyond it the clamp keeps the turn finite.
        sums = (spectrum.unsqueeze(-1) + spectrum.unsqueeze(-2) - 1).clamp_max(-0.1)
        turn = vectors @ ((vectors.mT @ c @ vectors) / sums) @ vectors.mT
        free = free @ matrix_exp(skew(turn))
    return x @ generator[..., :p, :p] + q @ generator[..., p:, :p]


def log_by_shooting(x: Point, y: Point, *, twist: float) -> Tangent:
    """The velocity of a geodesic from x to y at time 1, for every metric of the family (see `geodesic`).

    Shooting: the error at time 1 is transported back along the curve and subtracted from the velocity. Projections
    transport it. Their parts outside the span of a point also turn by ``exp((t/2 − 1)A)``, t the twist and A = xᵀu, as
    under the metric's connection; in the Euclidean metric that is the identity (docs/geometry.md, "The family of
    metrics").

    Source: zimmermann2022computing, p-shooting; bryner2017endpoint. O(n p²) + O(p³) per pass.
    """
    m, n, q = _coordinates(x, y)
    p = m.shape[-1]
    goal = torch.cat([m, n], dim=-2)
    a, r = skew(m), n
    chord = (_norm(m - _eye(p, p, m)).square() + _norm(n).square()).sqrt()
    scale = chord / _norm(torch.cat([a, r], -2)).clamp_min(TINY)
    a, r = scale * a, scale * r  # a straight line as long as the chord
    for _ in range(SHOOTING_PASSES):
        curve = _curve(a, r, twist)
        miss = curve[-1] - goal
        size = _norm(miss)
        if not float(size.amax()) > p * ROUNDING:  # a NaN ends it too
            break
        carried = miss
        turn = None if twist == 2 else matrix_exp((twist / 2 - 1) * a / (GRID - 1))
        for i, point in enumerate(reversed(curve)):
            carried = carried - point @ sym(point.mT @ carried)
            if turn is not None and i:
                inside = point @ (point.mT @ carried)
                carried = inside + (carried - inside) @ turn
            # Keep the length, as parallel transport does; the clamp keeps an error that is only rounding small.
            carried = carried * (size / _norm(carried).clamp_min(TINY)).clamp_max(2)
        a, r = a - skew(carried[..., :p, :]), r - carried[..., p:, :]
    return x @ a + q @ r


def _coordinates(x: Point, y: Point) -> tuple[Tensor, Tensor, Tensor]:
    """The factors m = xᵀy, n and orthonormal q ⟂ x with y = x m + q n; below 2p rows, q is padded with zeros."""
    p = x.shape[-1]
    m, rest = x.mT @ y, project_out(y, x)
    # Factorised together with x: if the rest has rank below p, its own factor would intersect span(x).
    q = torch.linalg.qr(torch.cat([x, rest], dim=-1))[0][..., p:]
    n = q.mT @ rest
    short = m.shape[-1] - q.shape[-1]
    if short > 0:
        q = torch.cat([q, q.new_zeros(*q.shape[:-1], short)], dim=-1)
        n = torch.cat([n, n.new_zeros(*n.shape[:-2], short, n.shape[-1])], dim=-2)
    return m, n, q


def _curve(a: Tensor, r: Tensor, twist: float) -> list[Tensor]:
    """Points of the geodesic from [I; 0] with velocity [a; r], at `GRID` times from 0 to 1."""
    p = a.shape[-1]
    generator = torch.cat([torch.cat([twist * a, -r.mT], dim=-1), torch.cat([r, torch.zeros_like(a)], dim=-1)], dim=-2)
    step = matrix_exp(generator / (GRID - 1))
    back = matrix_exp((1 - twist) * a / (GRID - 1))
    points = [_eye(2 * p, p, a).expand(*a.shape[:-2], 2 * p, p)]
    for _ in range(GRID - 1):
        points.append(step @ points[-1] @ back)
    return points


def _eye(n: int, p: int, like: Tensor) -> Tensor:
    return torch.eye(n, p, dtype=like.dtype, device=like.device)


def _norm(a: Tensor) -> Tensor:
    length: Tensor = torch.linalg.matrix_norm(a, keepdim=True)
    return length
