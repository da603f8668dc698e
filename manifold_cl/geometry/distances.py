"""Logarithms, inverse retractions and distances, each verified.

The result is mapped forward again and must reach y. A logarithm must also be shorter than a lower bound of the
injectivity radius, so that it is the only shortest one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry.metrics import Metric, as_metric, geodesic
from manifold_cl.geometry.retractions import RETRACTIONS, Invertible, Retraction
from manifold_cl.linalg import Point, Tangent

Map = Callable[[Tensor, Tensor], Tensor]
REACHED = 1e-9
"""Largest distance from the goal, in float64: a thousand times the largest one measured inside the radius."""


def logarithm(metric: Metric, x: Point, y: Point, *, tangent: Map) -> Tangent:
    """The velocity of the shortest geodesic between points in float64; ValueError if that is not certain.

    ``tangent(x, u)`` is the manifold's projection, which excludes paths through the protected subspace.
    """
    exp = partial(geodesic, twist=metric.twist)
    u = _verified(metric.log, exp, tangent, x, y, "no geodesic from x to y was found")
    length = float(metric.inner(x, u, u).max().clamp_min(0).sqrt()) if u.numel() else 0.0
    if not metric.radius:
        raise ValueError(
            f"y is {length:.3f} away along the geodesic that was found, which need not be the shortest: no lower bound "
            f"of the injectivity radius is proven for {metric!r}. Use a beta of at most 1"
        )
    if length >= metric.radius:
        raise ValueError(
            f"y is {length:.3f} away along the geodesic that was found, which need not be the shortest: "
            f"the {metric.name} injectivity radius is known to be at least {metric.radius:.3f}"
        )
    return u


def inverse_retraction(rule: Retraction, x: Point, y: Point, *, tangent: Map) -> Tangent:
    """The tangent vector u with ``rule(x, u) = y``, for points in float64; ValueError if that fails."""
    if not isinstance(rule, Invertible):
        have = ", ".join(name for name, other in sorted(RETRACTIONS.items()) if isinstance(other, Invertible))
        raise ValueError(f"the retraction {rule.name!r} has no closed-form inverse (these have: {have})")
    return _verified(rule.inverse, rule, tangent, x, y, f"the retraction {rule.name!r} does not reach y from x")


class Distance(torch.autograd.Function):
    """Length of the logarithm; its gradient is minus the unit vectors from each point to the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, manifold: Any) -> Tensor:
        """The distance, with two matrix dimensions of size 1."""
        u = manifold.logmap(x, y)
        length: Tensor = manifold.inner(x, u, keepdim=True).clamp_min(0).sqrt()
        ctx.save_for_backward(x, y, u, length)
        ctx.manifold = manifold
        return length

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for x and y, as covectors of the surrounding space; 0 for equal points."""
        x, y, u, length = ctx.saved_tensors
        metric: Metric = as_metric(ctx.manifold.metric)
        weight = -weight / torch.where(length > 0, length, torch.inf)
        at_x = weight * metric.lowered(x, u)
        at_y = weight * metric.lowered(y, ctx.manifold.logmap(y, x))
        return at_x.sum_to_size(x.shape), at_y.sum_to_size(y.shape), None


def _verified(inverse: Map, forward: Map, tangent: Map, x: Point, y: Point, failure: str) -> Tangent:
    if not x.numel():
        return torch.zeros_like(x)
    try:
        u: Tangent = tangent(x, inverse(x, y))
    except RuntimeError as error:  # a singular system: LinAlgError is one
        raise ValueError(f"{failure}: {error}") from None
    miss = torch.linalg.matrix_norm(forward(x, u) - y)
    if not bool((miss <= REACHED).all()):  # a NaN fails too
        failed = int((~(miss <= REACHED)).sum())
        raise ValueError(f"{failure} ({failed} of {miss.numel()} pairs): too far apart, or in two components")
    return u
