"""A fresh plain LoRA per task: the baseline that differs from EBLoRA only in what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from manifold_cl.adapters import LoRALinear, inject_adapters
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
        generator = stage.generator("adapters")
        inject_adapters(
            model,
            stage.targets,
            lambda _, linear: LoRALinear(linear, self.rank, alpha=self.alpha, generator=generator),
        )
