"""LoRALinear, the adapter without constraints that baselines use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter


class LoRALinear(Adapter):
    """``ΔW = (alpha / r) · left @ rightᵀ`` with free factors: right starts Kaiming-uniform, left at zero.

    Source: hu2022lora; right is its A transposed, left its B.

    Args:
        base: the layer to adapt.
        rank: r.
        alpha: numerator of the scaling; the rank if None.
        dropout: share of the adapter's inputs that are zeroed in training, in [0, 1).
        generator: for the start of ``right``.

    >>> LoRALinear(nn.Linear(6, 4), 2).factors().delta_weight().count_nonzero().item()
    0
    """

    kind = "lora"

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, alpha=alpha, dropout=dropout)
        inputs = self.right.shape[0]
        bound = 1 / math.sqrt(inputs)  # the bound of kaiming_uniform_(a=√5) on A (r, n)
        draw = torch.rand(inputs, rank, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            self.right.copy_((2 * draw - 1) * bound)

    def magnitude(self) -> Tensor:
        """``alpha / r``."""
        return torch.tensor(self.scaling, dtype=self.left.dtype, device=self.left.device)
