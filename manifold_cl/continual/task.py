"""What is learned, and in which order: a task, and a stream of tasks that share one model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_cl.continual.checks import validate_name
from manifold_cl.continual.companions import Companions

Split = Literal["train", "validation", "test"]


class Task(ABC):
    """One task: named data in three splits, a differentiable loss and a score in percent.

    The runner knows nothing else of a task, so any model and any kind of data fit: a batch is
    whatever `batches` yields and `loss` understands.
    """

    name: str

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of examples in ``split``."""

    def batch_count(self, split: Split, batch_size: int) -> int:
        """Number of batches in one pass over ``split``: the size over ``batch_size``, rounded up."""
        return math.ceil(self.size(split) / batch_size)

    @abstractmethod
    def batches(self, split: Split, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Any]:
        """One pass over ``split``: shuffled by ``generator``, in stored order without one."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of ``model`` over ``batch``, a 0-d tensor with a graph."""

    @abstractmethod
    def scores(self, model: nn.Module, split: Split = "test") -> Mapping[str, float]:
        """Scores in percent, the primary one first; no gradient is kept."""

    def evaluate(self, model: nn.Module, split: Split, folder: Path) -> Mapping[str, float]:
        """As `scores`, with whatever is worth keeping in ``folder``.

        The runner calls this, with a folder of its own for every evaluation. A task whose scoring takes long
        overrides it to write its answers there and to go on from those that an interrupted run left.
        """
        return self.scores(model, split)


@dataclass(frozen=True)
class TaskStream:
    """Tasks in the order in which they are learned, with the pre-trained model they start from."""

    name: str
    tasks: tuple[Task, ...]
    make_model: Callable[[], nn.Module]
    """Loads a fresh copy of the pre-trained model, in evaluation mode and frozen."""
    targets: str | tuple[str, ...]
    """The linear modules that receive adapters: suffixes of their names, or one regular expression."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where model and data come from: plain values, copied into the record."""
    companions: Companions | None = None
    """Parameters that train beside the adapters, unprotected; none by default."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"stream {self.name!r} has no tasks: give at least one")
        self.require_names()
        if self.companions is not None:
            self.companions.check(len(self.tasks))

    def require_names(self) -> None:
        """Refuse names that cannot be part of a folder's name, and tasks of one name.

        Tasks are the user's own objects, which can be renamed after the stream is made: each run asks again.

        Raises:
            TypeError: a name is no text.
            ValueError: with the name.
        """
        validate_name("stream", self.name)
        for name in self.task_names:
            validate_name("task", name)
        if len(set(self.task_names)) < len(self.tasks):
            raise ValueError(f"task names must differ, got {', '.join(self.task_names)}")

    def require_examples(self, split: Split) -> None:
        """Refuse a stream in which a task has nothing to learn from, or to be scored on.

        Args:
            split: that is needed of every task.

        Raises:
            ValueError: naming the tasks.
        """
        if bare := [task.name for task in self.tasks if not task.size(split)]:
            raise ValueError(
                f"stream {self.name!r} has no {split} examples of {', '.join(bare)}: give each task some, or leave it "
                "out"
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)
