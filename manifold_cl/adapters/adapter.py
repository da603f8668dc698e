"""What every low-rank adapter of a linear layer is: a frozen base and two tall factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from manifold_cl.linalg import full_precision


@dataclass(frozen=True, eq=False)
class Factors:
    """An update ``ΔW = magnitude · left @ rightᵀ`` as its factors: left (m, r), right (n, r), a 0-d magnitude."""

    left: Tensor
    right: Tensor
    magnitude: Tensor

    def delta_weight(self) -> Tensor:
        """The update as a matrix (m, n). O(m n r)."""
        with full_precision(self.left.device):
            return (self.magnitude * self.left) @ self.right.mT

    def added_to(self, weight: Tensor) -> Tensor:
        """``W + ΔW``, summed in the wider of both precisions and rounded once to the weight's."""
        wide = torch.promote_types(weight.dtype, self.left.dtype)
        return (weight.to(wide) + self.delta_weight().to(weight.device)).to(weight.dtype)


class Adapter(nn.Module, ABC):
    """``y = W x + (alpha / r) · s · left (rightᵀ x)`` around a frozen linear layer.

    Factors are float32 whatever the base is; their product with the input is computed in the input's precision.

    Args:
        base: the layer to adapt; it is frozen and shared, not copied.
        rank: r, at most the smaller side of the weight.
        alpha: numerator of the scaling alpha / r; the rank if not given, so that the scaling is 1.
    """

    kind: ClassVar[str]

    def __init__(self, base: nn.Linear, rank: int, *, alpha: float | None = None) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"adapters wrap nn.Linear, got {type(base).__name__}")
        check_rank(base, rank)
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        m, n = base.weight.shape
        like = base.weight
        self.left = nn.Parameter(torch.zeros(m, rank, dtype=torch.float32, device=like.device))
        self.right = nn.Parameter(torch.zeros(n, rank, dtype=torch.float32, device=like.device))

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @abstractmethod
    def magnitude(self) -> Tensor:
        """The 0-d factor in front of ``left @ rightᵀ``, scaling included."""

    def factors(self) -> Factors:
        """The update as detached factors (views of the parameters)."""
        return Factors(self.left.detach(), self.right.detach(), self.magnitude().detach())

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output. O((m + n) r) a row on top of the base."""
        inner = x @ self.right.to(x.dtype)
        update = (inner * self.magnitude().to(x.dtype)) @ self.left.to(x.dtype).mT
        return cast(Tensor, self.base(x)) + update

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"rank={self.rank}, alpha={self.alpha:g}"


def check_rank(base: nn.Linear, rank: int) -> None:
    """Refuse a rank that the layer's weight cannot have."""
    if not 1 <= rank <= min(base.weight.shape):
        raise ValueError(
            f"rank {rank} does not fit a weight of shape {tuple(base.weight.shape)}: "
            f"choose 1 to {min(base.weight.shape)}"
        )
