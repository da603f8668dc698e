"""The exponential maps of both metrics as retractions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from manifold_cl.geometry.geodesics import geodesic
from manifold_cl.geometry.long_steps import at_any_length
from manifold_cl.geometry.retractions.protocol import Order, orders
from manifold_cl.linalg import Point, Tangent


@dataclass(frozen=True)
class Exponential:
    """The geodesic of the Euclidean metric. Source: edelman1998geometry, section 2.2.2."""

    name: str = "exponential"
    order: Order = field(default_factory=orders(math.inf, 1), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``exp_x(u)``: `geodesic` with twist 2. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=2.0)


@dataclass(frozen=True)
class ExponentialCanonical:
    """The geodesic of the canonical metric. Source: edelman1998geometry, section 2.4.1."""

    name: str = "exponential_canonical"
    order: Order = field(default_factory=orders(1, math.inf), hash=False)
    self_correcting: bool = False
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``exp_x(u)``: `geodesic` with twist 1. O(n p²) + O(p³)."""
        return geodesic(x, u, twist=1.0)
