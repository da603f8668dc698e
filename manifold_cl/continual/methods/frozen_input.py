"""What `InfLoRA` and `KeepLoRA` share: the input factor is chosen and frozen, off a memory that grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from manifold_cl.continual.checks import check_positive, check_whole
from manifold_cl.continual.methods.remembering import Remembering
from manifold_cl.continual.subspaces import SubspaceMemory


@dataclass
class FrozenInput(Remembering):
    """A LoRA of which only the output factor trains, beside a memory of protected input directions."""

    rank: int = 16
    alpha: float = 32.0
    lr: float = 5e-4
    memory: SubspaceMemory | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_positive("lr", self.lr)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW without weight decay over the output factors."""
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)

    def restore(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Merge the updates again and read the last memory."""
        super().restore(model, folders)
        if folders:
            self.load_state(folders[-1])
