"""A fresh plain LoRA for every task: the baseline that differs from EBLoRA in nothing but what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from manifold_cl.adapters import LoRALinear, inject_adapters, merge_adapters
from manifold_cl.continual.checks import check_positive, check_whole
from manifold_cl.continual.method import Method, Stage


@dataclass
class SequentialMerge(Method):
    """A fresh LoRA adapter for every task, merged into the base when the task ends; nothing is protected.

    The structural control for `EBLoRA`: same layers, rank, scaling and merging. The default rate won on the
    validation stream (``benchmarks/results/tuning-sequential_merge.json``).
    """

    name = "sequential_merge"

    rank: int = 16
    alpha: float = 32.0
    lr: float = 1.4e-3

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_positive("lr", self.lr)

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters that start at ``ΔW = 0``."""
        generator = stage.generator("adapters")
        inject_adapters(
            model,
            stage.targets,
            lambda _, linear: LoRALinear(linear, self.rank, alpha=self.alpha, generator=generator),
        )

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW without weight decay over the factors."""
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge."""
        merge_adapters(model)
