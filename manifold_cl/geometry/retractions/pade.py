"""Padé retractions: rational approximations of the canonical geodesic that are exactly orthonormal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_cl.geometry.long_steps import at_any_length
from manifold_cl.geometry.retractions.protocol import Order, orders
from manifold_cl.linalg import Point, Square, Tangent, identity_like, split_tangent

ROOT = 4 + (80**0.5 + 4) ** (1 / 3) - (80**0.5 - 4) ** (1 / 3)
"""The real zero of the denominator of degree 3, ``120 − 60z + 12z² − z³``."""
FACTORS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((1 / 2, 0.0),),
    2: ((1 / 2, 1 / 12),),
    3: ((1 / ROOT, 0.0), (1 / 2 - 1 / ROOT, ROOT / 120)),
}
"""Degree → pairs (b, c): the approximant is the product of ``(1 + bz + cz²) / (1 − bz + cz²)``."""


@dataclass(frozen=True)
class Pade:
    """``r(W) x``, the diagonal Padé approximant r of the exponential, of degree m, on the canonical generator W.

    W is skew, with Wx = u, and r of a skew matrix is orthogonal. W maps span[x, b], b = u − xxᵀu, into itself, which
    leaves 2p × 2p systems. Of order 2m for the canonical metric. Degree 1 is `Cayley`.

    Each real factor of r is orthogonal itself and is applied on its own, so that a long step does not multiply their
    conditions. Beyond a length of 1e4 the condition of the quadratic factor, ``|W|²/12``, costs the result its digits:
    the manifold normalises it.

    Source: axen2023manifolds, the library, for the family; higham2008functions, section 10.3, for the approximants.

    Args:
        degree: m, from 1 to 3.

    Raises:
        ValueError: for another degree.

    >>> Pade(3).name, Pade(3).order["canonical"]
    ('pade_3', 6)
    """

    degree: int = 2
    name: str = field(init=False, default="")
    order: Order = field(init=False, default_factory=orders(1, 2), hash=False)
    self_correcting: bool = field(init=False, default=False)
    tangent_only: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        if self.degree not in FACTORS:
            raise ValueError(f"the degree of a Padé retraction is 1, 2 or 3, got {self.degree!r}")
        object.__setattr__(self, "name", f"pade_{self.degree}")
        object.__setattr__(self, "order", orders(1, 2 * self.degree)())

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``[x b] r(M)[:, :p]`` with ``M = [[A, −bᵀb], [I, 0]]``; one 2p × 2p solve per factor. O(n p²) + O(p³)."""
        a, b = split_tangent(x, u)
        p = x.shape[-1]
        # The similarity of `geodesic`, which balances M. A constant for autograd.
        size = torch.linalg.matrix_norm(b.detach(), keepdim=True).clamp_min(1)
        eye = identity_like(a)
        zero = torch.zeros_like(a)
        m = torch.cat([torch.cat([a, b.mT @ b / -size], -1), torch.cat([size * eye, zero], -1)], -2)
        parts = torch.cat([eye, zero], dim=-2)
        for b1, c in FACTORS[self.degree]:
            parts = parts + _odd_part(m, parts, b1, c)
        point: Point = x @ parts[..., :p, :] + b @ (parts[..., p:, :] / size)
        return point


PADE_2, PADE_3 = Pade(2), Pade(3)
"""The registered members."""


def _odd_part(m: Square, parts: Tensor, b: float, c: float) -> Tensor:
    """``2bM (I − bM + cM²)⁻¹ parts``: what the factor ``(1 + bz + cz²) / (1 − bz + cz²)`` adds to ``parts``."""
    denominator = identity_like(m) - b * m
    if c:
        denominator = denominator + c * (m @ m)
    # Without the check, which would wait for an accelerator: eigenvalues of the denominator are at least 1.
    solved: Tensor = torch.linalg.solve_ex(denominator, 2 * b * (m @ parts))[0]
    return solved
