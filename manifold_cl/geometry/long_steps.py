"""Long steps: their threshold, their largest length, and their computation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry.arguments import ANY, validate_arguments
from manifold_cl.linalg import NEAR, Point, Tangent, polar_near, read_largest

LONG = 8.0
"""Length above which a step is computed in float64: in float32 the rounding of x + u is 1e-7 times the length."""
LONGEST = 2.0**22
"""Largest length of a step; longer ones are shortened. The squared condition of x + u is then below 2e13, which leaves
float64 three digits. All angles of a longer step are right angles up to 1 / 4e6."""


def _itself(part: Tensor) -> Tensor:
    return part


def is_long(u: Tangent, *, total: Callable[[Tensor], Tensor] = _itself) -> bool:
    """Whether a step of the batch is longer than `LONG` or not finite; true if the host cannot read values.

    ``total`` sums over the ranks that hold rows of u.
    """
    length = read_largest(total(torch.linalg.vector_norm(u.detach(), dim=(-2, -1))))
    return length is None or not length <= LONG


def shortened(u: Tangent, *, total: Callable[[Tensor], Tensor] = _itself) -> Tangent:
    """The steps, shortened to at most `LONGEST`, without overflow."""
    if u.numel():
        largest = torch.linalg.vector_norm(u.detach(), math.inf, dim=(-2, -1), keepdim=True).clamp_min(1)
        share = torch.linalg.vector_norm(u / largest, dim=(-2, -1), keepdim=True) * (largest / LONGEST)
    else:
        share = u.new_zeros(*u.shape[:-2], 1, 1)
    return u / total(share).clamp_min(1)


def widened(x: Point, u: Tangent, *, off: Callable[[Tensor], Tensor] = _itself) -> tuple[Point, Tangent]:
    """The point and the step in float64, the step at most `LONGEST` long.

    A long step multiplies the constraint residuals of x by its length. The value of x is therefore corrected first, by
    ``off``, the projection off F, and by normalisation. Derivatives are those at x itself.
    """
    x = x.double()
    correction = (polar_near(off(x), far=NEAR) - x).detach()
    return x + correction, shortened(u.double())


def at_any_length(move: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Decorator of a retraction's ``__call__``: shortens long steps to `LONGEST` and computes them in float64."""

    @wraps(move)
    def guarded(self: Any, x: Point, u: Tangent) -> Point:
        validate_arguments(ANY, x=x, u=u)
        if not is_long(u):
            return move(self, x, u)
        return move(self, *widened(x, u)).to(x.dtype)

    return guarded
