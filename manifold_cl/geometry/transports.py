"""Vector transports along a retraction: which exist, what each one needs, and how a vector is carried.

``projection``: onto the tangent space at the end; always there, contracts a little.
``differentiated``: by the derivative of the retraction, in closed form where the retraction has one. The default of
the Cayley retractions.
``isometric``: the retraction's own (`Transporting`); lengths are kept and the way back undoes it.
``parallel``: of the canonical metric along its geodesics; the same two properties in that metric.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from manifold_cl.geometry.cayley import Cayley, IterativeCayley
from manifold_cl.geometry.geodesics import ExponentialCanonical, parallel_canonical
from manifold_cl.geometry.metrics import METRICS
from manifold_cl.geometry.projective import Polar
from manifold_cl.geometry.retractions import RETRACTIONS, Differentiable, Retraction, Transporting
from manifold_cl.linalg import Point, Tangent

TRANSPORTS = ("projection", "differentiated", "isometric", "parallel")
REVERSIBLE = ("isometric", "parallel")
"""Transports that a retraction back with the carried vector undoes: what geoopt's samplers ask for."""


def default_retraction(metric: str, transport: str | None) -> str:
    """The retraction a manifold uses unless told otherwise: what the transport needs, else the metric's own."""
    needed = {"isometric": "cayley", "parallel": "exponential_canonical"}
    return needed.get(transport or "", METRICS[metric].default_retraction)


def default_transport(retraction: Retraction) -> str:
    """The transport a manifold uses unless told otherwise.

    The curve of a Cayley retraction comes to rest as the step grows, and turns on the way. The projected step does
    neither, so that its inner product with a gradient is not the slope that a line search needs.
    """
    return "differentiated" if isinstance(retraction, Cayley | IterativeCayley) else "projection"


def check_transport(transport: str, retraction: Retraction, metric: str) -> None:
    """Refuse an unknown transport, and one that does not belong to this retraction or metric."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport is one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if transport == "isometric" and not isinstance(retraction, Transporting):
        have = ", ".join(name for name, rule in sorted(RETRACTIONS.items()) if isinstance(rule, Transporting))
        raise ValueError(f"the isometric transport belongs to {have}: {retraction.name!r} has none of its own")
    if transport == "parallel" and (metric != "canonical" or not isinstance(retraction, ExponentialCanonical)):
        raise ValueError(
            "parallel transport follows the geodesics of the canonical metric: it needs metric='canonical' and "
            f"retraction='exponential_canonical', got {metric!r} and {retraction.name!r}"
        )


def carry(transport: str, retraction: Retraction, x: Point, u: Tangent, v: Tangent) -> Tangent:
    """V carried from x along the retraction curve of u, up to a projection onto the tangent space there."""
    if transport == "parallel":
        return parallel_canonical(x, u, v)
    if transport == "isometric" and isinstance(retraction, Transporting):
        return retraction.transport(x, u, v)
    if transport == "differentiated":
        return differential(retraction, x, u, v)
    return v


def differential(retraction: Retraction, x: Point, u: Tangent, v: Tangent) -> Tangent:
    """``d/dt R(x, u + t v)`` at t = 0: the retraction's closed form, or forward-mode differentiation of its code.

    In the second case the polish that the manifold adds where the retraction does not correct itself counts too.
    """
    if isinstance(retraction, Differentiable):
        return retraction.differential(x, u, v)
    reached = torch.func.jvp(lambda step: retraction(x, step), (u,), (v,))
    y, derivative = cast(Tensor, reached[0]), cast(Tensor, reached[1])
    return derivative if retraction.self_correcting else Polar().differential(y, torch.zeros_like(y), derivative)
