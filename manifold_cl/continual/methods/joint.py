"""Joint training: all tasks at once, the reference that no sequence of tasks can be expected to reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.sequential_merge import SequentialMerge
from manifold_cl.continual.task import Split, Task
from manifold_cl.continual.training import Training


class Mixture(Task):
    """The batches of several tasks in one random order; a batch remembers its task."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.name = "+".join(task.name for task in tasks)
        self._tasks = tuple(tasks)

    def size(self, split: Split) -> int:
        """Examples of all tasks together."""
        return sum(task.size(split) for task in self._tasks)

    def batch_count(self, split: Split, batch_size: int) -> int:
        """Those of all tasks: no batch holds examples of two, so that each task rounds up for itself."""
        return sum(task.batch_count(split, batch_size) for task in self._tasks)

    def batches(self, split: Split, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Any]:
        """Pairs (task, batch), every batch of one task."""
        sources = [task.batches(split, batch_size=batch_size, generator=generator) for task in self._tasks]
        counts = [task.batch_count(split, batch_size) for task in self._tasks]
        order = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        if generator is not None:
            order = order[torch.randperm(len(order), generator=generator)]
        for position in order.tolist():
            yield self._tasks[position], next(sources[position])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of the task that the batch is from."""
        task, own = batch
        loss: Tensor = task.loss(model, own)
        return loss

    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """Mean over tasks of each task's primary score."""
        primary = [next(iter(task.scores(model, split).values())) for task in self._tasks]
        return {"mean": sum(primary) / len(primary)}


@dataclass
class Joint(SequentialMerge):
    """One LoRA adapter, trained on all tasks of the stream together in place of the first; later tasks add nothing.

    It sees every task's data at once, which no continual method may, and takes as many steps as they do, in one
    schedule. Its update has rank r; those that start an adapter for every task sum up to T times as much, so at equal
    r it is a bound by its data and not by its size.
    """

    name = "joint"

    lr: float = 1e-3

    def check_training(self, training: Training) -> None:
        """Refuse epochs and rates that change from task to task.

        Raises:
            ValueError: when they do.
        """
        for name in ("epochs", "rates"):
            given = getattr(training, name)
            if isinstance(given, tuple) and len(set(given)) > 1:
                raise ValueError(
                    f"joint learns all tasks at once and has one number of epochs and one rate for them, {name} has "
                    f"{', '.join(map(str, given))}: give one number, or leave joint out"
                )

    def lesson(self, stage: Stage) -> Task | None:
        """All tasks at the first stage, nothing after it."""
        return None if stage.index else Mixture(stage.tasks)

    def kept_examples(self, stage: Stage) -> int:
        """All of the other tasks'."""
        return sum(task.size("train") for task in stage.tasks if task is not stage.task)
