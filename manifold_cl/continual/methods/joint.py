"""The references on both sides of methods that learn in sequence: all tasks at once, and no training at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.continual.method import Method
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import Split, Task
from manifold_cl.continual.training import Training


class Mixture(Task):
    """The batches of several tasks in one random order; a batch keeps its task."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.name = "+".join(task.name for task in tasks)
        self.tasks = tuple(tasks)

    def size(self, split: Split) -> int:
        """Examples of all tasks together."""
        return sum(task.size(split) for task in self.tasks)

    def batch_count(self, split: Split, batch_size: int) -> int:
        """The sum over tasks, each rounded up, since a batch never mixes tasks."""
        return sum(task.batch_count(split, batch_size) for task in self.tasks)

    def batches(self, split: Split, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Any]:
        """Pairs (task, batch), every batch of one task."""
        sources = [task.batches(split, batch_size=batch_size, generator=generator) for task in self.tasks]
        counts = [task.batch_count(split, batch_size) for task in self.tasks]
        order = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        if generator is not None:
            order = order[torch.randperm(len(order), generator=generator)]
        for index in order.tolist():
            yield self.tasks[index], next(sources[index])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of the task that the batch is from."""
        task, own = batch
        return cast(Tensor, task.loss(model, own))

    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """Mean over tasks of each task's primary score."""
        primary = [next(iter(task.scores(model, split).values())) for task in self.tasks]
        return {"mean": sum(primary) / len(primary)}


@dataclass
class Joint(SequentialMerge):
    """One LoRA adapter, trained on all tasks of the stream together in place of the first; later tasks add nothing.

    It takes the same number of steps as a sequence of tasks, in one schedule. Its update has rank r, while T fresh
    adapters sum up to rank T r. So at equal r its advantage is the data and not the size.
    """

    name = "joint"

    lr: float = 1e-3

    def validate_training(self, training: Training) -> None:
        """Raise ValueError for epochs and rates that differ between tasks."""
        for name in ("epochs", "rates"):
            value = getattr(training, name)
            if isinstance(value, tuple) and len(set(value)) > 1:
                numbers = ", ".join(map(str, value))
                raise ValueError(
                    f"joint learns all tasks at once in one schedule, {name} has {numbers}: give one number"
                )

    def training_task(self, stage: Stage) -> Task | None:
        """All tasks at the first stage, none later."""
        return None if stage.index else Mixture(stage.tasks)

    def kept_examples(self, stage: Stage) -> int:
        """All training examples of the other tasks."""
        return sum(task.size("train") for task in stage.tasks if task is not stage.task)


@dataclass
class ZeroShot(Method):
    """No training at all; every row of its accuracy matrix is the pre-trained model's."""

    name = "zero_shot"
    trains = False

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Nothing to prepare."""

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Raise TypeError: the runner makes no optimizer for a method that does not train."""
        raise TypeError("zero_shot does not train")

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Nothing to merge."""
