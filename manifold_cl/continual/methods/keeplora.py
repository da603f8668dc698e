"""KeepLoRA: frozen input directions from the task's gradient, off pre-trained and earlier knowledge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from manifold_cl.adapters import LoRALinear, inject_adapters, merge_adapters
from manifold_cl.adapters.layers import device_of, target_linears
from manifold_cl.continual.checks import check_share, check_whole
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.frozen_input import FrozenInput
from manifold_cl.continual.subspaces import SubspaceMemory, grown, leading_directions, with_weights


@dataclass
class KeepLoRA(FrozenInput):
    """LoRA whose input factor is frozen: the leading right directions of the task's gradient, off the memory.

    The memory holds the leading directions of the pre-trained weights and, task by task, those of the gradient at the
    merged model. With orthonormal A and B = 0 at the start, training B takes projected gradient steps.

    Source: luo2026keeplora, the variant for LLaVA; method.md 7.

    Args:
        rank: r.
        alpha: numerator of the scaling.
        lr: of the output factors.
        energy: share of each task's gradient energy that the memory holds.
        from_weights: share of the pre-trained weights' energy that is protected from the start.
        statistic_examples: training examples that gradients are computed from.
    """

    name = "keeplora"

    energy: float = 0.99
    from_weights: float = 0.6
    statistic_examples: int = 160

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("energy", self.energy)
        check_share("from_weights", self.from_weights)
        check_whole("statistic_examples", self.statistic_examples)

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters with frozen input factors and zero output factors."""
        layers = target_linears(model, stage.targets)
        if self.memory is None:
            memory = SubspaceMemory.empty(layers)
            self.memory = with_weights(memory, layers, rank=self.rank, energy=self.from_weights)
        self.memory.require_layers(layers)
        memory = self.memory = self.memory.to(device_of(layers))
        starts = leading_directions(
            layers,
            lambda: stage.losses(model, self.statistic_examples, "start"),
            self.rank,
            memory,
            generator=stage.generator("sketch"),
        )
        draw = stage.generator("adapters")  # its draws are overwritten below: the global generator stays as it is
        adapters = inject_adapters(
            model, stage.targets, lambda _, layer: LoRALinear(layer, self.rank, alpha=self.alpha, generator=draw)
        )
        for name, adapter in adapters.items():
            right = memory[name].project_out(starts[name].right.to(memory[name].basis.dtype))
            with torch.no_grad():
                adapter.right.copy_(torch.linalg.qr(memory[name].project_out(right))[0])
            adapter.right.requires_grad_(False)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then let the memory grow by the gradient at the merged model."""
        merge_adapters(model)
        assert self.memory is not None
        self.memory = grown(
            self.memory,
            target_linears(model, stage.targets),
            lambda: stage.losses(model, self.statistic_examples, "memory"),
            source="gradient",
            energy=self.energy,
            rank=self.rank,
            generator=stage.generator("memory sketch"),
            task=stage.task.name,
        )

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the memory."""
        assert self.memory is not None
        self.memory.save(folder, task=stage.task.name, energy=self.energy, source="gradient")
