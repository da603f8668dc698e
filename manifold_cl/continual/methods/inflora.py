"""InfLoRA: each task trains inside a fixed input subspace that earlier tasks do not use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from manifold_cl.adapters import LoRALinear, inject_adapters, merge_adapters
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import device_of, stored_weight, target_linears
from manifold_cl.continual.checks import check_share, check_whole
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.frozen_input import FrozenInput
from manifold_cl.continual.subspaces import InputMoment, SubspaceMemory, gather


@dataclass
class InfLoRA(FrozenInput):
    """LoRA whose input factor is frozen: the leading input directions of the task, off the memory, over sqrt(3).

    The rows of a task's update lie in the span of that factor for all of training. The memory grows by the inputs
    seen after the task, with an energy threshold that rises over the stream. Energies are squares of the
    covariance's eigenvalues, as in the original. Its second way to store a memory of more than half of the space, as
    the complement, changes nothing but storage and is left out; growth stops where no room for an adapter is left.

    Source: liang2024inflora; method.md 7.

    Args:
        rank: r.
        alpha: numerator of the scaling.
        lr: of the output factors.
        energy: threshold at the first task.
        last_energy: threshold that one more task than the stream has would have; approached linearly.
        statistic_examples: training examples that covariances are computed from.
    """

    name = "inflora"

    lr: float = 7e-4
    energy: float = 0.95
    last_energy: float = 1.0
    statistic_examples: int = 160

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("energy", self.energy)
        check_share("last_energy", self.last_energy)
        check_whole("statistic_examples", self.statistic_examples)

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters with frozen input factors and zero output factors."""
        layers = target_linears(model, stage.targets)
        if self.memory is None:
            self.memory = SubspaceMemory.empty(layers)
        self.memory.require_layers(layers)
        memory = self.memory = self.memory.to(device_of(layers))
        moments = self._moments(model, layers, stage, "start")
        draw = stage.generator("adapters")  # its draws are overwritten below: the global generator stays as it is
        adapters = inject_adapters(
            model, stage.targets, lambda _, layer: LoRALinear(layer, self.rank, alpha=self.alpha, generator=draw)
        )
        for name, adapter in adapters.items():
            left, _, _ = torch.linalg.svd(memory[name].project_out(moments[name]).double(), full_matrices=False)
            frozen = memory[name].project_out(left[:, : self.rank].to(adapter.right))  # what rounding left inside
            with torch.no_grad():
                adapter.right.copy_(frozen / math.sqrt(3))
            adapter.right.requires_grad_(False)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then let the memory grow by the inputs that the merged model's layers see."""
        merge_adapters(model)
        assert self.memory is not None
        moments = self._moments(model, target_linears(model, stage.targets), stage, "memory")
        squared = {name: moment.double() @ moment.double() for name, moment in moments.items()}
        self.memory = self.memory.extended(
            squared, energy=self.threshold(stage), rank=self.rank, crossing="dropped", task=stage.task.name
        )

    def threshold(self, stage: Stage) -> float:
        """``ε_t = ε + (ε_T − ε) t / T`` for task t = 0, …, T − 1 of the stream."""
        return self.energy + (self.last_energy - self.energy) * stage.index / len(stage.tasks)

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the memory."""
        assert self.memory is not None
        self.memory.save(folder, task=stage.task.name, energy=self.threshold(stage), source="activation")

    def _moments(
        self, model: nn.Module, layers: Mapping[str, nn.Module], stage: Stage, purpose: str
    ) -> dict[str, Tensor]:
        statistics = {
            name: InputMoment(sides(layer)[1], device=stored_weight(layer).device) for name, layer in layers.items()
        }
        gather(layers, stage.losses(model, self.statistic_examples, purpose), statistics)
        return {name: statistic.moment() for name, statistic in statistics.items()}
