"""A task, and a stream of tasks that share one model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.continual.validation import validate_name
from manifold_cl.rules import described, validate_kind

Split = Literal["train", "validation", "test"]


class Task(ABC):
    """One task: named data in three splits, a differentiable loss and a score in percent.

    The runner uses nothing else, so any model and any kind of data fit: a batch is any object that `batches` yields
    and `loss` accepts.
    """

    name: str

    def validate_model(self, model: nn.Module) -> None:  # noqa: B027 - most tasks fit any model
        """Raise ValueError for a model that the task does not fit, before anything is trained."""

    def digest(self) -> str:
        """A digest of data and settings, which a run keeps in its configuration; empty for a task without one."""
        return ""

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

    def example_scores(self, model: nn.Module, split: Split = "test") -> Sequence[float] | None:
        """The primary score of every example in percent, in stored order; None where it is no mean over examples.

        Their mean is the primary score. Comparisons of two models use them as pairs.
        """
        return None

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split, *, batch_size: int = 64) -> dict[str, float]:
        """The primary ``score`` in percent, and the mean ``loss`` over the examples of ``split``.

        Two passes; a task that gets both from one pass overrides it.
        """
        total, count = 0.0, 0
        for start, batch in enumerate(self.batches(split, batch_size=batch_size)):
            size = min(batch_size, self.size(split) - start * batch_size)
            total, count = total + size * float(self.loss(model, batch)), count + size
        return {"score": float(next(iter(self.scores(model, split).values()))), "loss": total / count}

    def evaluate(self, model: nn.Module, split: Split, folder: Path) -> Mapping[str, float]:
        """The scores, with files about them in ``folder``.

        The runner calls this with one folder per evaluation. A task whose scoring takes long overrides it: it writes
        its answers there, and continues from the answers of an interrupted run.
        """
        return self.scores(model, split)


@dataclass(frozen=True)
class TaskStream:
    """Tasks in the order of learning, and the pre-trained model from which they start."""

    name: str
    tasks: tuple[Task, ...]
    make_model: Callable[[], nn.Module]
    """Loads a fresh copy of the pre-trained model, in evaluation mode and frozen."""
    targets: str | tuple[str, ...]
    """The linear modules that receive adapters: suffixes of their names, or one regular expression."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Origins of model and data: plain values, copied into the record."""
    additional_parameters: AdditionalParameters | None = None
    """Parameters that train beside the adapters, unprotected; none by default."""
    general: tuple[Task, ...] = ()
    """Tasks that are evaluated beside the others and never trained: they show what learning does to other abilities."""

    def __post_init__(self) -> None:
        validate_kind("tasks", self.tasks, Sequence, remedy="give a tuple of Task objects, one per task")
        if isinstance(self.make_model, nn.Module) or not callable(self.make_model):
            raise TypeError(
                f"make_model is a function that returns a fresh model, got {described(self.make_model)}: give the "
                "function itself, without calling it"
            )
        if not self.tasks:
            raise ValueError(f"stream {self.name!r} has no tasks: give at least one")
        self.validate_names()
        if self.additional_parameters is not None:
            self.additional_parameters.validate_tasks(len(self.tasks))

    def validate_names(self) -> None:
        """Refuse names that cannot be part of a folder's name, and two tasks of one name.

        Tasks are the user's own objects and can be renamed after the stream is made, so each run calls this again.
        """
        validate_name("stream", self.name)
        every = (*self.tasks, *self.general)
        if odd := [task for task in every if not hasattr(task, "name")]:
            raise TypeError(f"a task is a Task with a name, got {described(odd[0])}: give Task objects that set it")
        names = [task.name for task in every]
        for name in names:
            validate_name("task", name)
        if len(set(names)) < len(names):
            raise ValueError(f"task names must differ, got {', '.join(names)}")

    def validate_examples(self, split: Split) -> None:
        """Raise ValueError, with their names, for tasks that have no examples in ``split``."""
        if empty := [task.name for task in self.tasks if not task.size(split)]:
            names = ", ".join(empty)
            raise ValueError(f"stream {self.name!r} has no {split} examples of {names}: give each task some")

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)
