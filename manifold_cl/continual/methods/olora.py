"""O-LoRA: a penalty on the overlap of each task's input factor with those of earlier adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of, read_adapters
from manifold_cl.adapters.base_layers import sides
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import Task
from manifold_cl.continual.validation import option
from manifold_cl.rules import validate_number


@dataclass
class OLoRA(SequentialMerge):
    """`SequentialMerge` with ``λ Σ |A_t A_iᵀ|`` added to the loss, over layers and earlier tasks i, entry by entry.

    Earlier adapters are merged, which gives the same forward pass as separate adapters. The input factor A of each is
    kept. The penalty is soft: it separates adapters, not data.

    Source: wang2023olora; docs/method.md, "The other methods".

    Args:
        orthogonality: λ; 0.5 in the original.
    """

    name = "olora"

    orthogonality: float = option(5e-4, partial(validate_number, least=0.0))
    earlier: dict[str, list[Tensor]] = state_field(dict)
    """Layer → the input factors (n, r) of earlier tasks."""

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """The input factors of one task; every further task adds as much."""
        return 4 * self.rank * sum(sides(layer)[1] for layer in layers.values())

    def loss(self, model: nn.Module, task: Task, batch: Any) -> Tensor:
        """The task's loss and the penalty."""
        loss = super().loss(model, task, batch)
        return loss + self.orthogonality * self.penalty(model) if self.earlier else loss

    def penalty(self, model: nn.Module) -> Tensor:
        """``Σ |A_t A_iᵀ|`` over layers, earlier tasks and entries. O(n r² t) per layer."""
        overlaps = [
            (adapter.right.mT @ torch.cat(self.earlier[name], dim=1)).abs().sum()
            for name, adapter in adapters_of(model).items()
            if name in self.earlier
        ]
        return torch.stack(overlaps).sum()

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Keep the input factors, and merge."""
        for name, adapter in adapters_of(model).items():
            self.earlier.setdefault(name, []).append(adapter.right.detach().clone())
        super().end_task(model, stage)

    def state(self) -> Iterator[Tensor]:
        """The input factors of earlier tasks."""
        yield from (factor for factors in self.earlier.values() for factor in factors)

    def _restore_state(self, model: nn.Module, folders: Sequence[Path]) -> None:
        device = next(model.parameters()).device
        for folder in folders:
            for name, factors in read_adapters(folder).items():
                self.earlier.setdefault(name, []).append(factors.right.to(device))
