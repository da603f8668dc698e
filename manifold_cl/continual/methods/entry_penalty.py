"""The base of methods that penalise entries of the update by their importance for earlier tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.task import Task
from manifold_cl.continual.validation import option, validate_number


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
    importance: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Layer → Ω (m, n), outputs times inputs, not negative."""

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
        return self.factor * self.strength / self._mean() * torch.stack(parts).sum()

    def _mean(self) -> float:
        """The mean importance over the entries of all layers; 1 where nothing is important."""
        total = sum(float(each.sum(dtype=torch.float64)) for each in self.importance.values())
        return total / sum(each.numel() for each in self.importance.values()) or 1.0

    def state(self) -> Iterator[Tensor]:
        """The importances."""
        yield from self.importance.values()
