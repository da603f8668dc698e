"""Plain LoRA with its spectrum flattened at each task's end: balance without a manifold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage


@dataclass
class SVDEq(SequentialMerge):
    """`SequentialMerge` whose updates get equal singular values before they are merged, with the same norm.

    The cheap control for the claim that balance matters: the directions are those of plain LoRA.
    Source: docs/method.md, "The other methods".
    """

    name = "svd_eq"

    lr: float = 1.2e-3

    @torch.no_grad()
    def finish_task(self, model: nn.Module, stage: Stage) -> None:
        """Flatten every adapter's spectrum."""
        for adapter in adapters_of(model).values():
            left, right = flatten_spectrum(adapter.left, adapter.right)
            adapter.left.copy_(left)
            adapter.right.copy_(right)


def flatten_spectrum(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the matrix with the singular directions of ``left @ rightᵀ`` and equal singular values, norm kept.

    By thin QR of both factors and an r × r SVD, in float64. A zero update stays zero. O((m + n) r²).
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double())
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.mT)
    level = sigma.square().mean().sqrt()
    return (level * q_left @ u).to(left.dtype), (q_right @ vt.mT).to(right.dtype)
