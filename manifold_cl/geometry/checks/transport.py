"""`check_transport`: the laws of a vector transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from manifold_cl.geometry.checks.measure import draws, finite_difference, largest, leak, point_on, tangent_at, worst
from manifold_cl.geometry.checks.report import Law, Report


@dataclass(frozen=True)
class TransportReport(Report):
    """The measurements of ``retr_transp`` along a step, in float64."""

    kind: str
    reversible: bool
    agreement: float
    """Largest difference of the point from ``retr``."""
    tangency: float
    """Largest entry of yᵀv + vᵀy and Fᵀv for the vector carried to y."""
    at_zero: float
    """Largest change of a vector that is carried by a zero step."""
    linearity: float
    """Largest entry of T(2v − 3w) − 2T(v) + 3T(w)."""
    isometry: float
    """Largest change of an inner product in the manifold's metric."""
    way_back: float
    """Largest error of point and vector after going back with the carried step."""
    derivative: float
    """Largest difference from the derivative of the retraction, by finite differences."""

    def laws(self) -> tuple[Law, ...]:
        """Always tangent, linear and consistent; isometric and undone by the step back if reversible."""
        laws = [
            Law.below("the point differs from the retraction's by", self.agreement, 1e-14),  # the same arithmetic
            Law.below("carried vectors leave the tangent space by", self.tangency, 1e-13),  # sums of 80 roundings
            Law.below("a zero step changes vectors by", self.at_zero, 1e-13),
            Law.below("linearity is off by", self.linearity, 1e-12),  # ten roundings of numbers up to 5
        ]
        if self.reversible:
            laws += [
                Law.below("inner products change by", self.isometry, 1e-13),
                Law.below("the way back misses by", self.way_back, 1e-12),  # two steps and two vectors
            ]
        if self.kind == "differentiated":
            # Fourth-order differences at a step of 1e-3 err by 1e-12 times the fifth derivative, 1e-13 rounding.
            laws.append(Law.below("it differs from the retraction's derivative by", self.derivative, 1e-9))
        return tuple(laws)


def check_transport(manifold: Any, n: int, p: int, *, seed: int = 0, length: float = 1.0) -> TransportReport:
    """Measure the transport of ``manifold`` along a random step between n × p points.

    Args:
        manifold: a `RestrictedStiefel`, or any geoopt manifold with ``retr_transp``.
        n: rows of the points.
        p: columns.
        seed: seed of point and vectors.
        length: Frobenius length of the step.
    """
    draw = draws(seed)
    x = point_on(manifold, n, p, draw=draw)
    u, v, w = (tangent_at(manifold, x, draw) for _ in range(3))
    u = length * u
    y, there = manifold.retr_transp(x, u, v)
    _, other = manifold.retr_transp(x, u, w)
    _, mixed = manifold.retr_transp(x, u, 2 * v - 3 * w)
    step = manifold.transp_follow_retr(x, u, u)
    back, again = manifold.retr_transp(y, -step, there)
    pairs = ((there, there, v, v), (there, other, v, w), (step, other, u, w))
    derivative = finite_difference(lambda t: manifold.retr(x, u + t * v))
    kind = getattr(manifold, "transport", "projection")
    return TransportReport(
        name=f"{kind} transport of {type(manifold).__name__} along a step of length {length:g}",
        kind=kind,
        reversible=bool(manifold.reversible),
        agreement=largest(y - manifold.retr(x, u)),
        tangency=worst(largest(y.mT @ there + there.mT @ y), leak(manifold, there)),
        at_zero=largest(manifold.retr_transp(x, torch.zeros_like(u), v)[1] - v),
        linearity=largest(mixed - 2 * there + 3 * other),
        isometry=worst(*(abs(float(manifold.inner(y, a, b) - manifold.inner(x, c, d))) for a, b, c, d in pairs)),
        way_back=worst(largest(back - x), largest(again - v)),
        derivative=largest(there - derivative),
    )
