"""InfLoRA: each task trains inside a fixed input subspace that earlier tasks do not use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual.methods.bases import FrozenInputMethod
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import measure_input_moments
from manifold_cl.continual.validation import option
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.rules import validate_share


@dataclass
class InfLoRA(FrozenInputMethod):
    """LoRA whose frozen input factor is the leading input directions of the task, outside the memory, over sqrt(3).

    The rows of a task's update lie in the span of that factor throughout training. The memory grows by the inputs
    after the task, with an energy threshold that rises over the stream. Energies are squares of the moment's
    eigenvalues, as in the original. The original stores a memory of more than half of the space as its complement;
    that changes only storage and is left out. Growth stops where an adapter would have too few free directions.

    Source: liang2024inflora; docs/method.md, "The other methods".

    Args:
        energy: threshold at the first task.
        statistic_examples: training examples for the input moments.
        last_energy: threshold after one more task than the stream has, approached linearly.
    """

    name = "inflora"
    source = "activation"
    exact_moments = True

    lr: float = 7e-4
    energy: float = 0.95
    last_energy: float = option(1.0, validate_share)

    def input_statistics(
        self, model: nn.Module, layers: Mapping[str, nn.Module], stage: Stage, purpose: str = "start"
    ) -> Mapping[str, Tensor]:
        """The moment of each layer's inputs, over examples that are drawn for ``purpose``."""
        return measure_input_moments(layers, stage.losses(model, self.statistic_examples, purpose))

    def input_factor(self, statistic: Tensor, protected: ProtectedSubspace, like: Tensor) -> Tensor:
        """The leading directions of the moment outside the memory, over sqrt(3)."""
        left, _, _ = torch.linalg.svd(protected.project_out(statistic).double(), full_matrices=False)
        factor = protected.project_out(left[:, : self.rank].to(like))  # again: rounding left a part inside
        return factor / math.sqrt(3)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then let the memory grow by the inputs of the merged model's layers."""
        super().end_task(model, stage)
        assert self.memory is not None
        moments = self.input_statistics(model, target_linears(model, stage.targets), stage, "memory")
        squared = ((name, moment.double() @ moment.double()) for name, moment in moments.items())
        self.memory = self.memory.extended(
            squared, energy=self.threshold(stage), rank=self.rank, threshold_rule="exclusive", task=stage.task.name
        )

    def threshold(self, stage: Stage) -> float:
        """``ε_t = ε + (ε_T − ε) t / T`` for task t = 0, …, T − 1 of the stream."""
        return self.energy + (self.last_energy - self.energy) * stage.index / len(stage.tasks)
