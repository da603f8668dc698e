"""The polar retraction by a fixed number of Newton-Schulz passes: matrix products only, no value is read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from manifold_cl.geometry.arguments import of_one_shape
from manifold_cl.geometry.long_steps import LONG
from manifold_cl.geometry.retractions.protocol import Order, orders
from manifold_cl.geometry.retractions.qr_and_polar import PolarRules
from manifold_cl.linalg import (
    LARGE,
    Point,
    Tangent,
    gram_error,
    inverse_sqrt_deficit,
    minus_product,
    newton_schulz_steps,
    small_deficit,
)
from manifold_cl.rules import validate_positive


@dataclass(frozen=True)
class NewtonSchulz(PolarRules):
    """`Polar` with a fixed number of passes, which the longest expected step determines. No value is read.

    The singular values of x + u lie in ``[1, √(1 + |u|_F²)]`` for tangent u. The iteration is scaled to this interval,
    and its number of passes suffices for every ``|u|_F ≤ longest``. The result is then orthonormal to rounding.

    A longer step is neither shortened nor refused: its result keeps the polar factor of x + u, and is off the manifold
    by at most `error_bound`. The manifold normalises it, which completes the polar factor: always above `LONG`, and at
    every step if ``longest`` is below `LONG`.

    Source: higham2008functions, section 6.3, for the iteration; docs/geometry.md, "Retractions", for the interval.

    Args:
        longest: the longest step without `error_bound`, above 0. Above 4 one more correction follows, since the
            rounding of the Gram matrix grows with the square of the step.

    Raises:
        ValueError: for a length that is not above 0.

    >>> NewtonSchulz(1.0).passes(torch.float32), NewtonSchulz().passes(torch.float32)
    (4, 9)
    """

    longest: float = LONG
    name: str = field(init=False, default="newton_schulz")
    order: Order = field(init=False, default_factory=orders(2, 1), hash=False)
    self_correcting: bool = field(init=False, default=True)
    tangent_only: bool = field(init=False, default=True)
    of_sum: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        validate_positive("longest, the length of the longest step,", self.longest)
        if self.longest != LONG:
            object.__setattr__(self, "name", f"newton_schulz_{self.longest!r}")
        object.__setattr__(self, "self_correcting", self.longest >= LONG)

    @property
    def finished(self) -> bool:
        """Whether a second correction follows the passes."""
        return self.longest**2 > LARGE

    def passes(self, dtype: torch.dtype) -> int:
        """The number of passes, which the longest step and the precision determine."""
        return newton_schulz_steps(self.longest**2, torch.finfo(dtype).eps)

    def error_bound(self, length: float, dtype: torch.dtype = torch.float32) -> float:
        """Largest ``|yᵀy − I|₂`` after a tangent step of Frobenius norm ``length``, in exact arithmetic.

        A pass maps an error e in [0, 1) to ``e²(3 + e)/4``; the first error is ``h / (1 + h)`` with h = length²/2.
        """
        half = length**2 / 2
        error = half / (1 + half)
        for _ in range(self.passes(dtype) + 1):  # `inverse_sqrt_deficit` ends with a pass of its own
            error = error * error * (3 + error) / 4
        if self.finished:  # by a series that leaves 5/8 e³ to leading order
            error = abs((1 - error) * (1 + error / 2 + 3 / 8 * error**2) ** 2 - 1)
        return error

    @of_one_shape
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``(x + u)(I + uᵀu)^(-1/2)`` by a fixed number of passes, up to `error_bound`. O(n p²) + O(p³)."""
        y = x + u
        q = minus_product(y, y, inverse_sqrt_deficit(gram_error(y), steps=self.passes(y.dtype)))
        return minus_product(q, q, small_deficit(gram_error(q))) if self.finished else q
