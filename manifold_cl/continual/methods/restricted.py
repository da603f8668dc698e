"""Restricted but unbalanced: the second of the two ablations that separate EBLoRA's ingredients."""

from __future__ import annotations

from dataclasses import dataclass

from manifold_cl.continual.methods.eblora import EBLoRA


@dataclass
class Restricted(EBLoRA):
    """`EBLoRA` with a full r × r core between its frames: the same protection, any spectrum."""

    name = "restricted"
    core = "full"

    lr: float = 1.2e-2
    scale_lr: float = 5e-3
