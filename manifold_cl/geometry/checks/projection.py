"""`check_projection`: the laws of ``proju``, ``projx`` and the gradient map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from manifold_cl.geometry.checks.measure import draws, gaussian, largest, leak, point_on, unit, worst
from manifold_cl.geometry.checks.report import Law, Report

LIMIT = 1e-12
"""Rounding of sums of a few hundred float64 terms, for vectors of length 1."""


@dataclass(frozen=True)
class ProjectionReport(Report):
    """The measurements of a manifold's projections, relative to vectors of length 1."""

    idempotence: float
    """``|Π(Π(z)) − Π(z)|``."""
    self_adjointness: float
    """``|⟨Π(z), w⟩ − ⟨z, Π(w)⟩|``."""
    tangency: float
    """Largest entry of xᵀu + uᵀx and Fᵀu for u = Π(z)."""
    duality: float
    """``|g(grad, v) − ⟨G, v⟩|`` for a tangent v."""
    point: float
    """Worst constraint error of projx of an arbitrary matrix."""
    nearest: float
    """Largest entry of projx(x + normal) − x for a small normal vector."""

    def laws(self) -> tuple[Law, ...]:
        """All residuals below 1e-12, except that of the nearest point, of second order in a step of 1e-4."""
        residuals = {
            "projecting twice differs from once by": self.idempotence,
            "self-adjointness is off by": self.self_adjointness,
            "projected vectors leave the tangent space by": self.tangency,
            "the gradient pairs wrongly with tangent vectors by": self.duality,
            "projected points are off the manifold by": self.point,
        }
        return (
            *(Law.below(name, value, LIMIT) for name, value in residuals.items()),
            Law.below("projx moves along the manifold by", self.nearest, 1e-7),  # the square of 1e-4, ten times
        )


def check_projection(manifold: Any, n: int, p: int, *, seed: int = 0) -> ProjectionReport:
    """Measure the laws of ``proju``, ``egrad2rgrad`` and ``projx`` at a random point of size n × p, in float64.

    Args:
        manifold: a `RestrictedStiefel`, or any geoopt manifold of n × p matrices with orthonormal columns.
        n: rows of the point.
        p: columns.
        seed: seed of the point and the vectors.
    """
    draw = draws(seed)
    x = point_on(manifold, n, p, draw=draw)
    z, w, g = (unit(gaussian(n, p, draw=draw)) for _ in range(3))
    u, v = manifold.proju(x, z), manifold.proju(x, w)
    y = manifold.projx(gaussian(n, p, draw=draw))
    return ProjectionReport(
        name=f"projections of {type(manifold).__name__} at a {n} × {p} point",
        idempotence=float((manifold.proju(x, u) - u).norm()),
        self_adjointness=abs(float((u * w).sum() - (z * v).sum())),
        tangency=worst(largest(x.mT @ u + u.mT @ x), leak(manifold, u)),
        duality=abs(float(manifold.inner(x, manifold.egrad2rgrad(x, g), v) - (g * v).sum())),
        point=worst(largest(y.mT @ y - torch.eye(p, dtype=y.dtype)), leak(manifold, y)),
        nearest=largest(manifold.projx(x + 1e-4 * (z - u)) - x),
    )
