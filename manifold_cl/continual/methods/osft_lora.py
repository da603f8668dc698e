"""OSFT in rank r: LoRA outside the leading singular directions of the present weights, on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.adapters import adapters_of
from manifold_cl.adapters.base_layers import plain_weight, sides
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.validation import option
from manifold_cl.rules import validate_share


@dataclass
class OSFTLoRA(SequentialMerge):
    """`SequentialMerge` with ``U_hᵀ ΔW = 0`` and ``ΔW V_h = 0``, U_h and V_h the leading singular vectors of W.

    W is the weight as it is when the task begins, so that nothing is kept between tasks. Task t of T protects
    ``share (t − 1) / T`` of the directions. Factors are projected after each step: the original projects gradients,
    and Adam's scaling of entries then leaves the complement.

    Published is the constraint for the complete low part of W; the rank-r form is ours.

    Source: nayak2026sculpting; docs/method.md, "The other methods".

    Args:
        share: of the smaller side of a weight, protected after all tasks.
    """

    name = "osft_lora"

    share: float = option(1.0, validate_share)
    frames: dict[str, tuple[Tensor, Tensor]] = state_field(dict)
    """Layer → leading left (m, k) and right (n, k) singular vectors of the weight at the start of the task."""

    def keep_updates(self) -> None:
        """Raise ValueError: the singular vectors are those of the weights with all earlier updates."""
        raise ValueError("osft_lora takes singular vectors of the weights, so that updates are merged: merge instead")

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """The singular vectors that a last task of many keeps out of."""
        counts = {name: min(int(self.share * min(sides(x))), min(sides(x)) - self.rank) for name, x in layers.items()}
        return 4 * sum(counts[name] * sum(sides(layer)) for name, layer in layers.items())

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Take the singular vectors, and inject adapters with input factors outside them."""
        part = self.share * stage.index / max(len(stage.tasks), 1)
        self.frames = {
            name: leading_frames(layer, part, self.rank) for name, layer in target_linears(model, stage.targets).items()
        }
        super().begin_task(model, stage)
        self.project(model)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW, with both factors projected after each step."""
        optimizer = super().make_optimizer(model)
        optimizer.register_step_post_hook(lambda *_: self.project(model))
        return optimizer

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Move the factors of all adapters to the nearest ones outside the protected directions."""
        for name, adapter in adapters_of(model).items():
            for factor, frame in zip((adapter.left, adapter.right), self.frames[name], strict=True):
                factor.sub_(frame @ (frame.mT @ factor))


def leading_frames(layer: nn.Module, part: float, rank: int) -> tuple[Tensor, Tensor]:
    """Left (m, k) and right (n, k) singular vectors of a weight, k the `part` of its smaller side, less the rank.

    Raises:
        TypeError: the weight is quantised.
    """
    weight = plain_weight(layer, to="take singular vectors of").detach().float()
    smaller = min(sides(layer))
    count = min(int(part * smaller), smaller - rank)
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :count].contiguous(), vt[:count].mT.contiguous()
