"""The base of methods that penalise entries of the update by their importance for earlier tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import device_of, target_linears
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import Task
from manifold_cl.continual.validation import option
from manifold_cl.rules import validate_number


@dataclass
class EntryPenalty(SequentialMerge):
    """`SequentialMerge` with ``c λ Σ Ω_ij (ΔW_ij)² / mean(Ω)`` added to the loss, over layers and entries.

    Ω is the importance of an entry for earlier tasks, and the mean runs over the entries of all layers, so that λ has
    the same meaning for every model. The first task has no penalty.

    Args:
        strength: λ.
    """

    factor: ClassVar[float] = 1.0
    """c."""

    strength: float = option(1.0, partial(validate_number, least=0.0))
    importance: dict[str, Tensor] = state_field(dict)
    """Layer → Ω (m, n), outputs times inputs, not negative."""

    _scale: float = field(default=0.0, init=False, repr=False)
    """``c λ / mean(Ω)``."""

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """The importance of every entry."""
        return 4 * sum(math.prod(sides(layer)) for layer in layers.values())

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters, and prepare the importance for the steps of this task: on their device, with its mean."""
        super().begin_task(model, stage)
        device = device_of(target_linears(model, stage.targets))
        self.importance = {name: each.to(device) for name, each in self.importance.items()}
        self._scale = self.factor * self.strength / self._mean() if self.importance else 0.0

    def loss(self, model: nn.Module, task: Task, batch: Any) -> Tensor:
        """The task's loss and the penalty."""
        loss = super().loss(model, task, batch)
        return loss + self.penalty(model) if self.importance else loss

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty of the present updates; 0-d. O(m n r) per layer."""
        parts = [
            (self.importance[name] * (adapter.magnitude() * adapter.left @ adapter.right.mT).square()).sum()
            for name, adapter in adapters_of(model).items()
            if name in self.importance
        ]
        return self._scale * torch.stack(parts).sum()

    def _mean(self) -> float:
        """The mean importance over the entries of all layers; 1 where nothing is important."""
        total = sum(float(each.sum(dtype=torch.float64)) for each in self.importance.values())
        return total / sum(each.numel() for each in self.importance.values()) or 1.0

    def state(self) -> Iterator[Tensor]:
        """The importances."""
        yield from self.importance.values()
