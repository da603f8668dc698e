"""The published optimizer step as it is computed there: the yardstick of ``bench_step.py``, not for use.

Its equations (docs/method.md, "Our step and the released one") with its costs: frames of one shape are stacked anew in
each step, complements are padded to the widest of all and stacked again before and after the base step, F is applied
three times, and the polar factor comes from a batched SVD. Written from the equations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class PublishedStep:
    """AdamW on frames (n, p), some with a complement (n, k)."""

    def __init__(self, frames: Sequence[Tensor], complements: Mapping[Tensor, Tensor], *, lr: float) -> None:
        self.base = torch.optim.AdamW(frames, lr=lr, weight_decay=0.0)
        widest = max((c.shape[1] for c in complements.values()), default=0)
        self.padded = {x: torch.nn.functional.pad(c, (0, widest - c.shape[1])) for x, c in complements.items()}
        self.shapes: dict[tuple[object, ...], list[Tensor]] = {}
        for x in frames:
            self.shapes.setdefault((x.shape, x in complements), []).append(x)

    @torch.no_grad()
    def step(self) -> None:
        """One step of all frames."""
        olds = {}
        for key, frames in self.shapes.items():
            x = olds[key] = torch.stack(list(frames))
            g = self._canonical(x, torch.stack([f.grad for f in frames if f.grad is not None]), frames)
            for frame, new in zip(frames, g, strict=True):
                frame.grad = new
        self.base.step()
        for key, frames in self.shapes.items():
            x = olds[key]
            kappa = math.sqrt(4096 / x.shape[-1])
            y = x + self._canonical(x, (torch.stack(list(frames)) - x) * kappa, frames)
            left, _, right = torch.linalg.svd(self._off(y, frames), full_matrices=False)
            for frame, new in zip(frames, left @ right, strict=True):
                frame.copy_(new)

    def _canonical(self, x: Tensor, g: Tensor, frames: Sequence[Tensor]) -> Tensor:
        g = self._off(g, frames)
        return g - x @ (g.mT @ x)

    def _off(self, z: Tensor, frames: Sequence[Tensor]) -> Tensor:
        if frames[0] not in self.padded:
            return z
        basis = torch.stack([self.padded[frame] for frame in frames])
        return z - basis @ (basis.mT @ z)
