"""The interface of a continual-learning method: what it does before, during and after each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.adapters import read_adapters, save_adapters
from manifold_cl.adapters.base_layers import is_quantised
from manifold_cl.adapters.frozen_updates import keep_factors
from manifold_cl.adapters.inject import keep_adapters, merge_adapters, merge_factors
from manifold_cl.adapters.layers import target_linears
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.options import validate_rank
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import Task
from manifold_cl.continual.training import Training
from manifold_cl.continual.validation import validate_options

ADDED: Mapping[str, Any] = MappingProxyType(
    {
        "shared_inputs": False,
        "compact_memory": False,
        "start_examples": None,
        "statistics_during": 0.0,
        "depth_scale_start": 1.0,
    }
)
"""Options of later versions, and their defaults: left out of a record at the default, so that older runs resume."""


_T = TypeVar("_T")


def state_field(start: Callable[[], _T]) -> _T:
    """A dataclass field for state that a method carries from task to task, with its value before the first task."""
    result: _T = field(default_factory=start, init=False, repr=False, metadata={"state": True})
    return result


class Method(ABC):
    """A way to learn task after task. Subclasses are dataclasses: their fields are the options of the method.

    Per task, the runner calls `begin_task`, `make_optimizer`, `loss` for every batch inside the `step_context` of its
    step, `finish_task` and `end_task`.
    After `end_task` the model must answer for all tasks so far.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = True
    keeps_updates = False
    """Whether updates act beside the frozen weights, see `keep_updates`."""

    def __post_init__(self) -> None:
        validate_options(self)

    def validate_model(self, model: nn.Module, targets: Sequence[str]) -> None:
        """Raise ValueError for targets that the model lacks, a rank that they cannot hold, and weights to merge into.

        Updates of a quantised weight can only act beside it, see `keep_updates`.
        """
        for name, layer in target_linears(model, targets).items():
            if rank := self.options().get("rank"):
                validate_rank(layer, rank, name)
            if self.trains and not self.keeps_updates and is_quantised(layer):
                raise ValueError(
                    f"{name} is quantised, and an update cannot be merged into it: call keep_updates() of the method, "
                    "after which updates act beside the weights, or load the model in bfloat16"
                )

    def validate_training(self, training: Training) -> None:  # noqa: B027 - most methods accept any
        """Refuse training options that the method cannot follow."""

    def keep_updates(self) -> None:
        """From now on let each task's update act beside the frozen weights; nothing is merged. For quantised bases.

        Raises:
            ValueError: for a method that trains the weights themselves.
        """
        self.keeps_updates = True

    def merge(self, model: nn.Module) -> dict[str, Factors]:
        """Merge all adapters, or keep their updates beside the weights; layer → update. Called by `end_task`."""
        return keep_adapters(model) if self.keeps_updates else merge_adapters(model)

    def training_task(self, stage: Stage) -> Task | None:
        """The task that is trained at this stage; None where there is nothing to train."""
        return stage.task if self.trains else None

    @abstractmethod
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Prepare the model. The parameters that train afterwards are those that `make_optimizer` steps on."""

    @abstractmethod
    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of this task; the runner adds the learning-rate schedule."""

    def loss(self, model: nn.Module, task: Task, batch: Any) -> Tensor:
        """The training loss of one batch: the task's own unless the method adds to it."""
        return task.loss(model, batch)

    def step_context(self, model: nn.Module, stage: Stage, step: int, steps: int) -> AbstractContextManager[None]:
        """A context for the forward and backward passes of step number ``step``, from 1, of ``steps``."""
        return nullcontext()

    def collects(self, step: int, steps: int) -> bool:
        """Whether `step_context` collects something in this step, so that no checkpoint follows it in the task."""
        return False

    def finish_task(self, model: nn.Module, stage: Stage) -> None:  # noqa: B027 - most methods do nothing
        """Change the update before it is saved and merged."""

    @abstractmethod
    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge the update into the model, and keep what protects this task from later ones."""

    def save_update(self, model: nn.Module, folder: Path, stage: Stage) -> None:
        """Write the update of this task, before `end_task` merges it."""
        save_adapters(model, folder, task=stage.task.name)

    def save_state(self, folder: Path, stage: Stage) -> None:  # noqa: B027 - most methods have no state
        """Write the state that the method carries to the next task."""

    def load_state(self, folder: Path) -> None:  # noqa: B027 - most methods have no state
        """Read the state that `save_state` wrote. Ranks after the first do, so that all have the same bits."""

    def restore(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Set model and method to their state after the last of ``folders``, bit for bit.

        Without folders, that is the pre-trained model and a fresh method.
        """
        self._restore_model(model, folders)
        for one in fields(self):  # type: ignore[arg-type]
            if one.metadata.get("state"):
                setattr(self, one.name, cast(Callable[[], Any], one.default_factory)())
        if folders:
            self._restore_state(model, folders)

    def _restore_model(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Merge the updates in ``folders`` again, or keep them beside the weights."""
        for folder in folders:
            (keep_factors if self.keeps_updates else merge_factors)(model, read_adapters(folder))

    def _restore_state(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Set the state, which is that of a fresh method, to the one after the last of ``folders``."""
        self.load_state(folders[-1])

    def state(self) -> Iterator[Tensor]:
        """The tensors that the method carries from task to task besides the model."""
        yield from ()

    def kept_examples(self, stage: Stage) -> int:
        """Number of training examples of other tasks that the stage needs; 0 for a continual method."""
        return 0

    def capacity(self) -> dict[str, float]:
        """Occupancy of the memory, as in a record; empty for a method without a memory."""
        return {}

    def options(self) -> dict[str, Any]:
        """The options and their values; those of `ADDED` only where they are not the default."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.init}  # type: ignore[arg-type]
        return {key: value for key, value in values.items() if key not in ADDED or value != ADDED[key]}
