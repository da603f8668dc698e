"""What a continual-learning method is: four verbs around each task."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.adapters import read_adapters, save_adapters
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.layers import target_linears
from manifold_cl.adapters.options import validate_rank
from manifold_cl.continual.task import Task

if TYPE_CHECKING:
    from manifold_cl.continual.training import Training


def seeded(seed: int, *purpose: object) -> torch.Generator:
    """A generator of its own for every (seed, purpose): draws do not depend on what was drawn before."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Stage:
    """One task's place in the run: what a method may know beside model and data."""

    task: Task
    index: int
    targets: Sequence[str]
    seed: int
    batch_size: int
    tasks: Sequence[Task] = ()
    """All tasks of the stream; a continual method leaves them alone."""

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness for ``purpose`` at this stage."""
        return seeded(self.seed, self.index, purpose)

    def losses(self, model: nn.Module, examples: int, purpose: str) -> Iterator[Callable[[], Tensor]]:
        """Thunks of the loss on about ``examples`` random training examples, in shuffled batches."""
        seen = 0
        for batch in self.task.batches("train", batch_size=self.batch_size, generator=self.generator(purpose)):
            if seen >= examples:
                return
            seen += self.batch_size
            yield partial(self.task.loss, model, batch)


class Method(ABC):
    """A way to learn task after task. Subclasses are dataclasses: their fields are the method's options.

    The runner calls `begin_task`, `make_optimizer`, then `loss` for every batch, then `finish_task` and `end_task`, and
    knows nothing else. After `end_task` the model must be able to answer for all tasks so far.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = True

    def check(self, model: nn.Module, targets: Sequence[str]) -> None:
        """Refuse, before anything is spent, targets or a rank that the model does not have."""
        layers = target_linears(model, targets)
        if rank := self.options().get("rank"):
            for layer in layers.values():
                validate_rank(layer, rank)

    def check_training(self, training: Training) -> None:  # noqa: B027 - most methods take any
        """Refuse, before anything is spent, a way to train that the method cannot follow."""

    def lesson(self, stage: Stage) -> Task | None:
        """What is trained at this stage: its task; None where a method has nothing to learn there."""
        return stage.task if self.trains else None

    @abstractmethod
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Prepare the model: what trains after this call is what `make_optimizer` steps on."""

    @abstractmethod
    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of this task; the runner adds the learning-rate schedule."""

    def loss(self, model: nn.Module, task: Task, batch: Any) -> Tensor:
        """The training loss of one batch: the task's own unless the method adds to it."""
        return task.loss(model, batch)

    def finish_task(self, model: nn.Module, stage: Stage) -> None:  # noqa: B027 - most methods have nothing to do
        """What is left to do on the update before it is written and folded in."""

    @abstractmethod
    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Fold what was learned into the model, and remember what later tasks must leave alone."""

    def save_update(self, model: nn.Module, folder: Path, stage: Stage) -> None:
        """Write what this task added, before `end_task` folds it in."""
        save_adapters(model, folder, task=stage.task.name)

    def save_state(self, folder: Path, stage: Stage) -> None:  # noqa: B027 - most methods have no state
        """Write what the method itself carries to the next task."""

    def load_state(self, folder: Path) -> None:  # noqa: B027 - most methods have no state
        """Take what `save_state` wrote; ranks after the first do, so that all carry the same bits."""

    def restore(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Bring model and method to where they were after the last of ``folders``, bit for bit."""
        for folder in folders:
            merge_factors(model, read_adapters(folder))

    def state(self) -> Iterator[Tensor]:
        """The tensors that it carries from task to task beside the model."""
        yield from ()

    def kept_examples(self, stage: Stage) -> int:
        """How many training examples of tasks other than the stage's it needs at hand; 0 is what continual means."""
        return 0

    def capacity(self) -> dict[str, float]:
        """How full the method's memory is; empty for a method without one."""
        return {}

    def options(self) -> dict[str, Any]:
        """The options with their values, plain."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}  # type: ignore[arg-type]
