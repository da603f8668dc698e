"""Balanced but unrestricted: the first of the two ablations that separate EBLoRA's ingredients."""

from __future__ import annotations

from dataclasses import dataclass

from manifold_cl.continual.methods.bases import FrameMethod


@dataclass
class Balanced(FrameMethod):
    """`EBLoRA` without a memory: one magnitude and orthonormal frames per layer, nothing protected."""

    name = "balanced"

    lr: float = 3e-3
