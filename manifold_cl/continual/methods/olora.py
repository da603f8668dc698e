"""O-LoRA: a penalty pushes each task's input directions off those of earlier adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of, read_adapters
from manifold_cl.continual.checks import check_number
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.sequential_merge import SequentialMerge
from manifold_cl.continual.task import Task


@dataclass
class OLoRA(SequentialMerge):
    """`SequentialMerge` with ``λ Σ |A_t A_iᵀ|`` added to the loss, over layers and earlier tasks i, entry by entry.

    Earlier adapters are merged, which leaves the forward pass the same as keeping them beside the new one; of each its
    input factor A is remembered. The penalty is soft: it keeps adapters apart, and says nothing about data.

    Source: wang2023olora; method.md 7.

    Args:
        orthogonality: λ; 0.5 in the original.
    """

    name = "olora"

    orthogonality: float = 5e-4
    earlier: dict[str, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    """Layer → the input factors (n, r) of earlier tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("orthogonality", self.orthogonality, least=0.0)

    def loss(self, model: nn.Module, task: Task, batch: Any) -> Tensor:
        """The task's loss and the penalty."""
        loss = super().loss(model, task, batch)
        if not self.earlier:
            return loss
        return loss + self.orthogonality * self.penalty(model)

    def penalty(self, model: nn.Module) -> Tensor:
        """``Σ |A_t A_iᵀ|`` over layers, earlier tasks and entries. O(n r² t) a layer."""
        overlaps = [
            (adapter.right.mT @ torch.cat(self.earlier[name], dim=1)).abs().sum()
            for name, adapter in adapters_of(model).items()
            if name in self.earlier
        ]
        return torch.stack(overlaps).sum()

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Remember the input factors, and merge."""
        for name, adapter in adapters_of(model).items():
            self.earlier.setdefault(name, []).append(adapter.right.detach().clone())
        super().end_task(model, stage)

    def state(self) -> Iterator[Tensor]:
        """The input factors of earlier tasks."""
        yield from (factor for factors in self.earlier.values() for factor in factors)

    def restore(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Merge the updates again and read their input factors."""
        super().restore(model, folders)
        self.earlier = {}
        device = next(model.parameters()).device
        for folder in folders:
            for name, factors in read_adapters(folder).items():
                self.earlier.setdefault(name, []).append(factors.right.to(device))
