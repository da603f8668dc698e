"""Balanced but unrestricted: the first of the two ablations that separate EBLoRA's ingredients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from manifold_cl.adapters import merge_adapters
from manifold_cl.continual.method import Method, Stage
from manifold_cl.continual.methods.eblora import EBLoRA

OF_THE_MEMORY = ("energy", "source", "statistics_at", "from_weights", "policy")
"""Options of `EBLoRA` that say what its memory holds."""


@dataclass
class Balanced(EBLoRA):
    """`EBLoRA` without a memory: one magnitude, orthonormal frames, nothing protected.

    Options that say what is protected keep their defaults here; others are refused.
    """

    name = "balanced"

    lr: float = 3e-3
    scale_lr: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {option.name: option.default for option in fields(self)}
        if changed := [name for name in OF_THE_MEMORY if getattr(self, name) != defaults[name]]:
            raise ValueError(
                f"balanced protects nothing, so {' and '.join(changed)} would change nothing: leave "
                f"{'it' if len(changed) == 1 else 'them'} out, or take eblora"
            )

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
