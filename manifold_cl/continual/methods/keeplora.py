"""KeepLoRA: frozen input directions from the task's gradient, outside pre-trained and earlier knowledge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of
from manifold_cl.continual.methods.bases import FrozenInputMethod, block_indices
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import Passes, SingularTriplets, leading_directions
from manifold_cl.continual.validation import option
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.rules import validate_positive, validate_share


@dataclass
class KeepLoRA(FrozenInputMethod):
    """LoRA whose frozen input factor is the leading right directions of the task's gradient, outside the memory.

    The memory holds the leading directions of the pre-trained weights and, task by task, those of the gradient at the
    merged model. With orthonormal A and B = 0 at the start, training B takes projected gradient steps.

    Source: luo2026keeplora, the variant for LLaVA, and luo2026keeplorapp for ``depth_scale_start``; docs/method.md,
    "The other methods".

    Args:
        energy: share of each task's gradient energy that the memory holds.
        statistic_examples: training examples for the gradients.
        from_weights: share of the pre-trained weights' energy that is protected from the start.
        depth_scale_start: factor of the update in the first block; it grows linearly with the block's index to 1 in the
            last one. 0.2 is KeepLoRA++.
    """

    name = "keeplora"
    source = "gradient"

    lr: float = 5e-4
    energy: float = 0.99
    from_weights: float = option(0.6, validate_share)
    depth_scale_start: float = option(1.0, validate_positive)

    @torch.no_grad()
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """As `FrozenInputMethod`; the factor by depth is in the input factors, since a file holds one alpha."""
        super().begin_task(model, stage)
        adapters = adapters_of(model)
        for name, factor in self.depth_factors(list(adapters)).items():
            adapters[name].right.mul_(factor)

    def depth_factors(self, names: Sequence[str]) -> dict[str, float]:
        """``γ + (1 − γ) l / (L − 1)`` for the layers of block l of L; 1 for a single block."""
        blocks, start = block_indices(names), self.depth_scale_start
        deepest = max(blocks.values())
        return {name: start + (1 - start) * (block / deepest if deepest else 1.0) for name, block in blocks.items()}

    def input_statistics(
        self, model: nn.Module, layers: Mapping[str, nn.Module], stage: Stage
    ) -> Mapping[str, SingularTriplets]:
        """The leading directions of each layer's gradient outside the memory."""
        losses, passes = stage.losses(model, self.statistic_examples, "start"), Passes(seed=stage.derive_seed("sketch"))
        return leading_directions(layers, losses, self.rank, self.memory, passes=passes)

    def input_factor(self, statistic: SingularTriplets, protected: ProtectedSubspace, like: Tensor) -> Tensor:
        """The right directions, orthonormal again after two projections."""
        right = protected.project_out(statistic.right.to(protected.basis.dtype))
        return cast(Tensor, torch.linalg.qr(protected.project_out(right))[0])

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then let the memory grow by the gradient at the merged model."""
        super().end_task(model, stage)
        self.grow_memory(model, stage)
