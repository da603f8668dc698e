"""Balanced but unrestricted: the first of the two ablations that separate EBLoRA's ingredients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from manifold_cl.adapters import merge_adapters
from manifold_cl.continual.method import Method, Stage, register_method
from manifold_cl.continual.methods.eblora import EBLoRA


@register_method
@dataclass
class Balanced(EBLoRA):
    """`EBLoRA` without a memory: one magnitude, orthonormal frames, nothing protected."""

    name = "balanced"

    lr: float = 3e-3
    scale_lr: float = 1e-2

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge; the memory stays empty."""
        merge_adapters(model)

    def save_state(self, folder: Path, stage: Stage) -> None:
        """There is none."""

    def restore(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Merge the updates again."""
        Method.restore(self, model, folders)

    def capacity(self) -> dict[str, float]:
        """Nothing fills up."""
        return {}
