"""The stage of a run at one task: the task, its index, and the randomness that belongs to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from manifold_cl.continual.losses import Losses, task_losses
from manifold_cl.continual.task import Task


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed per (seed, purpose), so that draws do not depend on earlier draws for other purposes."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Stage:
    """One task within a run: all that a method may use besides model and data.

    Args:
        task: the task to learn.
        index: its index in the stream, from 0.
        targets: the linear modules that receive adapters, as in `TaskStream`.
        seed: of the run.
        batch_size: examples per forward pass.
        tasks: all tasks of the stream; a continual method does not use them.
    """

    task: Task
    index: int
    targets: Sequence[str]
    seed: int
    batch_size: int
    tasks: Sequence[Task] = ()

    def derive_seed(self, purpose: str) -> int:
        """A seed for ``purpose`` at this stage."""
        return derive_seed(self.seed, self.index, purpose)

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for ``purpose`` at this stage."""
        return torch.Generator().manual_seed(self.derive_seed(purpose))

    def losses(self, model: nn.Module, examples: int, purpose: str) -> Losses:
        """Losses of about ``examples`` random training examples, the same in every pass."""
        seed = self.derive_seed(purpose)
        return task_losses(model, self.task, examples=examples, batch_size=self.batch_size, seed=seed)
