"""ELLA: a penalty on the entries that earlier updates have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from manifold_cl.adapters import read_adapters
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.entry_penalty import EntryPenalty
from manifold_cl.continual.stage import Stage


@dataclass
class ELLA(EntryPenalty):
    """`SequentialMerge` with ``λ Σ (ΔW_ij E_ij)² / mean(E²)`` added to the loss, E the sum of all earlier updates.

    Entries that no earlier task has changed are free. The penalty depends on the coordinates, and not on the sign of E.
    Published is the penalty; its strength is not, and dividing by the mean is ours.

    Source: biswas2026ella; docs/method.md, "The other methods".

    Args:
        strength: λ.
    """

    name = "ella"

    drift: dict[str, Tensor] = state_field(dict)
    """Layer → E (m, n)."""

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """The importance and the drift of every entry."""
        return 2 * super().carried_nbytes(layers)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, and add the update to the earlier ones."""
        for name, update in self.merge(model).items():
            self._add(name, update)

    def _restore_state(self, model: nn.Module, folders: Sequence[Path]) -> None:
        for folder in folders:
            self.load_state(folder)

    def load_state(self, folder: Path) -> None:
        """Add the task's update to the earlier ones."""
        for name, update in read_adapters(folder).items():
            self._add(name, update)

    @torch.no_grad()
    def _add(self, name: str, update: Factors) -> None:
        change = update.delta_weight()
        self.drift[name] = self.drift[name].to(change) + change if name in self.drift else change
        self.importance[name] = self.drift[name].square()
