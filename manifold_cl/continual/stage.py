"""The stage of a run at one task: the task, its index, and the randomness that belongs to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

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
        on_statistics: called in every pass for statistics with (pass, batch, batches): the number of the pass over
            these losses, from 1, and the number of finished batches, from 0.
    """

    task: Task
    index: int
    targets: Sequence[str]
    seed: int
    batch_size: int
    tasks: Sequence[Task] = ()
    on_statistics: Callable[[int, int, int], None] | None = None

    def derive_seed(self, purpose: str) -> int:
        """A seed for ``purpose`` at this stage."""
        return derive_seed(self.seed, self.index, purpose)

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for ``purpose`` at this stage."""
        return torch.Generator().manual_seed(self.derive_seed(purpose))

    def losses(self, model: nn.Module, examples: int, purpose: str) -> Losses:
        """Losses of about ``examples`` random training examples, the same in every pass."""
        seed = self.derive_seed(purpose)
        losses = task_losses(model, self.task, examples=examples, batch_size=self.batch_size, seed=seed)
        if self.on_statistics is None:
            return losses
        batches = min(math.ceil(examples / self.batch_size), self.task.batch_count("train", self.batch_size))
        return _reported(losses, batches, self.on_statistics)


def _reported(losses: Losses, batches: int, report: Callable[[int, int, int], None]) -> Losses:
    """The same losses; ``report`` is called at the start of each pass, and after each batch."""
    passes = count(1)

    def start() -> Iterator[Callable[[], Tensor]]:
        number = next(passes)
        report(number, 0, batches)
        for done, loss in enumerate(losses(), 1):
            yield loss
            report(number, done, batches)

    return start
