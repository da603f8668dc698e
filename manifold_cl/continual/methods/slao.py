"""SLAO: one LoRA adapter for all tasks, whose output factor is a running mean over tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters import adapters_of, read_adapters
from manifold_cl.adapters.base_layers import sides
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.validation import option
from manifold_cl.rules import validate_number, validate_positive
from manifold_cl.tensor_files import read_tensors, write_tensors

FILE = "factors.safetensors"


@dataclass
class SLAO(SequentialMerge):
    """One adapter ``L Rᵀ`` of rank r for all tasks; the model after task t has ``L ← L + t⁻ᵖ (L_t − L)`` and ``R_t``.

    A later task begins at the last trained output factor and an orthonormal basis of the last input factor's columns.
    Both train without a penalty. Each task's file holds the change of the product, of rank 2r.

    Source: qiao2025merge; docs/method.md, "The other methods".

    Args:
        power: p; 0.5 is the published one, 0 keeps the last task's factor alone.
    """

    name = "slao"

    lr: float = option(7e-4, validate_positive)
    power: float = option(0.5, partial(validate_number, least=0.0))
    trained: dict[str, Tensor] = state_field(dict)
    """Layer → the output factor (m, r) as the last task trained it."""
    merged: dict[str, tuple[Tensor, Tensor]] = state_field(dict)
    """Layer → the factors (m, r) and (n, r) of the model's update."""

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """The trained output factors, and both factors of the update."""
        return 4 * self.rank * sum(2 * m + n for m, n in map(sides, layers.values()))

    @torch.no_grad()
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters that replace the present update by the start of this task."""
        super().begin_task(model, stage)
        if self.merged:
            for name, adapter in adapters_of(model).items():
                left, right = self.merged[name]
                adapter.left.copy_(left)
                adapter.right.copy_(right)
                adapter.compensate()
                adapter.left.copy_(self.trained[name])
                adapter.right.copy_(orthonormal(right))

    @torch.no_grad()
    def finish_task(self, model: nn.Module, stage: Stage) -> None:
        """Move the output factor by the share of this task."""
        share = (stage.index + 1) ** -self.power
        for name, adapter in adapters_of(model).items():
            self.trained[name] = adapter.left.detach().clone()
            if name in self.merged:
                adapter.left.copy_(torch.lerp(self.merged[name][0].to(adapter.left), adapter.left, share))
            self.merged[name] = (adapter.left.detach().clone(), adapter.right.detach().clone())

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the trained output factors; the others are in the task's update."""
        write_tensors(folder / FILE, self.trained, {"task": stage.task.name})

    def load_state(self, folder: Path) -> None:
        """Read the factors."""
        self.trained = read_tensors(folder / FILE)[0]
        self.merged = {
            name: (update.left[:, : self.rank], update.right[:, : self.rank])
            for name, update in read_adapters(folder).items()
        }

    def state(self) -> Iterator[Tensor]:
        """The trained output factors and the factors of the update."""
        yield from self.trained.values()
        yield from (factor for pair in self.merged.values() for factor in pair)


def orthonormal(right: Tensor) -> Tensor:
    """Q (n, r) of ``right = Q T``, T upper triangular with a diagonal that is not negative."""
    basis, triangle = torch.linalg.qr(right)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return cast(Tensor, basis * signs)
