"""The Euclidean and the canonical metric of the Stiefel manifold, their geodesics and logarithms.

A metric's gradient map is no projection: vectors are made tangent by the orthogonal projection in either metric.

The logarithms reduce the problem to 2p × 2p matrices in the basis [x q], where q spans the part of y outside span(x),
and iterate there, batched. They work in float64 and guarantee neither convergence nor the shortest geodesic:
`distances` verifies both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_cl.linalg import (
    Point,
    Tangent,
    identity_like,
    log_orthogonal,
    matrix_exp,
    project_out,
    skew,
    split_tangent,
    sym,
)

CANONICAL_PASSES = 100
SHOOTING_PASSES = 400
"""Limits, reached only by iterations that fail: inside the radii at most 9 and 42 passes were measured."""
GRID = 5
"""Points of the curve through which the shooting error is transported back."""
TINY = 1e-300
"""Avoids a division by zero for a zero vector."""
ROUNDING = 20 * 2.0**-52
"""Error per column at which an iteration in float64 has converged: roundings of sums of 2p products."""


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
        """The velocity of a geodesic from x to y, not verified: `log_euclidean`."""
        return log_euclidean(x, y)


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


Metric = EuclideanMetric | CanonicalMetric
METRICS: Mapping[str, Metric] = {"euclidean": EuclideanMetric(), "canonical": CanonicalMetric()}
"""The metrics by name."""


def geodesic(x: Point, u: Tangent, *, twist: float) -> Point:
    """The point at time 1 of the geodesic with velocity u.

    Computes ``[x b] expm([[tA, −bᵀb], [I, 0]])[:, :p] expm((1 − t)A)`` with A = xᵀu, b = u − xA and t = ``twist``: 1 in
    the canonical metric, 2 in the Euclidean. No tall matrix is factorised. O(n p²) + O(p³).

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


def log_euclidean(x: Point, y: Point) -> Tangent:
    """The velocity of a Euclidean geodesic from x to y at time 1.

    Shooting: projections transport the error at time 1 back along the curve; it is subtracted from the velocity.

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
        curve = _curve(a, r)
        miss = curve[-1] - goal
        size = _norm(miss)
        if not float(size.amax()) > p * ROUNDING:  # a NaN ends it too
            break
        carried = miss
        for point in reversed(curve):
            carried = carried - point @ sym(point.mT @ carried)
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


def _curve(a: Tensor, r: Tensor) -> list[Tensor]:
    """Points of the Euclidean geodesic from [I; 0] with velocity [a; r], at `GRID` times from 0 to 1."""
    p = a.shape[-1]
    generator = torch.cat([torch.cat([2 * a, -r.mT], dim=-1), torch.cat([r, torch.zeros_like(a)], dim=-1)], dim=-2)
    step = matrix_exp(generator / (GRID - 1))
    back = matrix_exp(-a / (GRID - 1))
    points = [_eye(2 * p, p, a).expand(*a.shape[:-2], 2 * p, p)]
    for _ in range(GRID - 1):
        points.append(step @ points[-1] @ back)
    return points


def _eye(n: int, p: int, like: Tensor) -> Tensor:
    return torch.eye(n, p, dtype=like.dtype, device=like.device)


def _norm(a: Tensor) -> Tensor:
    length: Tensor = torch.linalg.matrix_norm(a, keepdim=True)
    return length
