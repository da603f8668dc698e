"""Plain LoRA without protection: a fresh adapter per task, or one that is trained further on every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of, read_adapters
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.bases import AdapterMethod
from manifold_cl.continual.stage import Stage


@dataclass
class SequentialMerge(AdapterMethod):
    """A fresh LoRA adapter per task, merged into the base when the task ends; nothing is protected.

    The structural control for `EBLoRA`: same layers, rank, scaling and merging. The default rate won on the
    validation stream (``benchmarks/results/tuning-sequential_merge.json``).
    """

    name = "sequential_merge"

    lr: float = 1.4e-3

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters that start at ``ΔW = 0``."""
        self.inject_lora(model, stage)


@dataclass
class Sequential(SequentialMerge):
    """One LoRA adapter continued over all tasks, so that their sum has rank r: sequential fine-tuning of most papers.

    When a task ends, its change is merged. The next task continues from the same factors, with their product
    subtracted. This is the same function as one adapter that stays in place, and each task's file has its own update.

    Source: docs/method.md, "The other methods".
    """

    name = "sequential"

    lr: float = 1e-3
    factors: dict[str, tuple[Tensor, Tensor]] = state_field(dict)
    """Layer → left (m, r) and right (n, r) after the last task."""

    @torch.no_grad()
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters that continue from the last task's factors."""
        super().begin_task(model, stage)
        if self.factors:
            for name, adapter in adapters_of(model).items():
                left, right = self.factors[name]
                adapter.left.copy_(left)
                adapter.right.copy_(right)
                adapter.compensate()

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Keep the factors, and merge the change of this task."""
        self.factors = {
            name: (adapter.left.detach().clone(), adapter.right.detach().clone())
            for name, adapter in adapters_of(model).items()
        }
        self.merge(model)

    def state(self) -> Iterator[Tensor]:
        """The factors that the next task continues from."""
        yield from (factor for pair in self.factors.values() for factor in pair)

    def load_state(self, folder: Path) -> None:
        """Read the factors from the task's update, whose first r columns they are."""
        self.factors = {
            name: (update.left[:, : self.rank], update.right[:, : self.rank])
            for name, update in read_adapters(folder).items()
        }
