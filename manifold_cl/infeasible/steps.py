"""Landing, POGO, and the update of second-order landing: matrix products and p × p work, without a retraction.

With ``g = xᵀx``, two tangent parts of a displacement d are in use. Both satisfy ``xᵀu + uᵀx = 0``, for every x of full
rank: such a u leaves ``xᵀx`` unchanged to first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_cl.geometry.arguments import of_one_shape
from manifold_cl.linalg import Point, Tangent, gram, gram_error, sym
from manifold_cl.rules import validate_positive, validate_share


def relative_part(x: Point, d: Tensor) -> Tangent:
    """``skew(d xᵀ) x = (d xᵀx − x dᵀx) / 2``, the part of d that relative gradients have (ablin2023infeasible).

    At a point, the part of d outside span(x) is halved. O(n p²).
    """
    return (d @ gram(x, x) - x @ gram(d, x)) / 2


def level_part(x: Point, d: Tensor) -> Tangent:
    """``d − x s``, the orthogonal projection of d onto the tangent space of the level set of xᵀx through x.

    The symmetric s solves ``g s + s g = xᵀd + dᵀx``, in the eigenbasis of ``g = xᵀx``. O(n p²) + O(p³).
    """
    values, vectors = torch.linalg.eigh(gram(x, x))
    right = vectors.mT @ (2 * sym(gram(x, d))) @ vectors
    solution = vectors @ (right / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ vectors.mT
    part: Tangent = d - x @ solution
    return part


def newton_schulz_part(x: Point) -> Tensor:
    """``x (I − xᵀx) / 2``, one Newton-Schulz step towards the nearest orthonormal matrix. O(n p²)."""
    return x @ gram_error(x) / -2


@dataclass(frozen=True)
class Landing:
    """``x + u − η λ x(xᵀx − I)`` with u the relative part of d: descent and attraction in one step.

    Where the step would leave the safe region ``|xᵀx − I|_F ≤ radius``, it is shortened to reach its boundary at most.
    A matrix outside the region takes a Newton-Schulz step instead of the displacement, which is our choice.

    Source: ablin2022fast; ablin2023infeasible, with the safe step length.

    Args:
        attraction: λ, the strength of attraction. η λ is the share of the deviation that a step halves.
        radius: of the safe region, below 1.
    """

    attraction: float = 1.0
    radius: float = 0.5
    name: str = "landing"
    order: int = 2

    def __post_init__(self) -> None:
        validate_positive("attraction", self.attraction)
        validate_share("radius, that of the safe region,", self.radius, one=False)

    @of_one_shape
    def __call__(self, x: Point, d: Tensor, *, lr: float | Tensor) -> Tensor:
        """The step with displacement d, made with the rate ``lr``. O(n p²)."""
        error = gram_error(x)
        field = relative_part(x, d) - lr * self.attraction * (x @ error)
        distance = torch.linalg.matrix_norm(error, keepdim=True)
        length = torch.linalg.matrix_norm(field, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        # The share s of the step with |Δ| − 2 s η λ |Δ| (1 − |Δ|) + s² |field|² = radius; s η λ ≤ 1/2 is needed.
        pull = lr * self.attraction * distance * (1 - distance)
        root = (pull.square() + length.square() * (self.radius - distance).clamp_min(0)).sqrt()
        share = ((pull + root) / length / length).clamp_max(1 / max(1.0, 2 * float(lr) * self.attraction))
        return x + torch.where(distance <= self.radius, share * field, x @ error / -2)


@dataclass(frozen=True)
class POGO:
    """``m + m(I − mᵀm) / 2`` with ``m = x + u``, u the relative part of d: a step, then one Newton-Schulz step.

    The deviation after a step is at most about ``¾ |u|⁴``. Diverges where a singular value of m exceeds √3.

    Source: javaloy2026embarrassingly, with the constant λ = 1/2 of its default.
    """

    name: str = "pogo"
    order: int = 4

    @of_one_shape
    def __call__(self, x: Point, d: Tensor, *, lr: float | Tensor) -> Tensor:
        """The step with displacement d; the rate is not needed. O(n p²)."""
        middle = x + relative_part(x, d)
        return middle + newton_schulz_part(middle)


@dataclass(frozen=True)
class SecondOrderLanding:
    """``x + u + x(I − xᵀx) / 2`` with u the level part of d: tangent and normal part in one sum.

    Converges quadratically with `newton_direction` as displacement. With the displacement of another optimizer, which
    is our addition, it is a first-order step whose deviation after a step is about ``|u|²``.

    Source: xiong2026second for the update; the tangent part of a general displacement is ours.
    """

    name: str = "second_order_landing"
    order: int = 2

    @of_one_shape
    def __call__(self, x: Point, d: Tensor, *, lr: float | Tensor) -> Tensor:
        """The step with displacement d; the rate is not needed. O(n p²) + O(p³)."""
        return x + level_part(x, d) + newton_schulz_part(x)
