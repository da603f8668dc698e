"""A ``Trainer`` class made to train one task: the method's optimizer and loss, checkpoints of what trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from manifold_cl.adapters import adapters_of
from manifold_cl.continual.task import Split, Task
from manifold_cl.continual.training_loop import TrainingJob
from manifold_cl.files import FileError, read_json, write_json
from manifold_cl.integrations.transformers.training_data import TaskBatches
from manifold_cl.lists import listed
from manifold_cl.tensor_files import read_tensors, write_tensors

TRAINED = "trained.safetensors"
LOSSES = "losses.json"
LOSSES_FORMAT = "manifold_cl.losses"

logger = logging.getLogger("manifold_cl")


@dataclass
class TaskTraining:
    """One task that a Trainer trains, and the losses of its steps.

    Args:
        job: the task, the method, and what is reported to.
        batches: the task's own batches; None where the Trainer has a dataset.
    """

    job: TrainingJob
    batches: TaskBatches | None = None
    losses: list[float] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    """Losses of the present step's batches."""


class TrainerLoss(Task):
    """The task of one batch whose loss a Trainer has computed: what a method gets to add to."""

    def __init__(self, task: Task, loss: Tensor) -> None:
        self.name, self._task, self._loss = task.name, task, loss

    def size(self, split: Split) -> int:
        """Examples of the task."""
        return self._task.size(split)

    def batches(self, split: Split, *, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Any]:
        """Batches of the task."""
        return self._task.batches(split, batch_size=batch_size, generator=generator)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The Trainer's loss."""
        return self._loss

    def scores(self, model: nn.Module, split: Split = "test") -> Any:
        """Scores of the task."""
        return self._task.scores(model, split)


class StepReports(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Sums the losses of each step, refuses one that is not finite, and measures the optimizer's time."""

    def __init__(self, training: TaskTraining) -> None:
        self._training = training
        self._share: Any = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Start of the optimizer's step."""
        self._share = self._training.job.clock.share("optimizer")
        self._share.__enter__()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """End of the optimizer's step."""
        self._share.__exit__(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the loss of a step."""
        training = self._training
        loss = sum(torch.stack(training.parts).tolist())
        training.parts.clear()
        training.losses.append(loss)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of {training.job.stage.task.name} became {loss} at step {len(training.losses)}: lower the "
                "learning rate, or look for an example without labels; the finished tasks are kept"
            )
        training.job.on_step(len(training.losses), state.max_steps, loss)
        self._keep_resumable(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End of an epoch, after which the Trainer may save."""
        self._keep_resumable(state, control)

    def _keep_resumable(self, state: Any, control: Any) -> None:
        """Write no checkpoint after steps in which the method collects what no checkpoint holds."""
        if control.should_save and self._training.job.method.collects(state.global_step, state.max_steps):
            control.should_save = False
            logger.info(
                "%s: no checkpoint after step %d of %d, since the method collects statistics in the last steps",
                self._training.job.stage.task.name, state.global_step, state.max_steps,
            )  # fmt: skip


class TaskMethods(Trainer):  # type: ignore[misc]  # transformers has no types
    """The methods of a Trainer that change for one task, given as ``trainer.training``."""

    training: TaskTraining
    optimizer: Optimizer | None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The method's optimizer."""
        if self.optimizer is None:
            training = self.training
            optimizer = training.job.method.make_optimizer(self.model)
            if training.job.additional is not None:
                training.job.additional.add_to(optimizer, self.model, training.job.stage.index)
            self.optimizer = optimizer
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss, or the task's own, and what the method adds to it while it trains."""
        training = self.training
        if training.batches is not None:
            return training.job.method.loss(model, training.job.stage.task, inputs)
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = training.job.method.loss(model, TrainerLoss(training.job.stage.task, own), inputs)
        if loss is own or num_items_in_batch is None:
            return loss
        # The Trainer's part is a share of the whole step already; what is added comes once per batch.
        return own + (loss - own) / self.current_gradient_accumulation_steps

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass, whose loss is kept."""
        training, step, steps = self.training, self.state.global_step + 1, self.state.max_steps
        with training.job.method.step_context(self.model, training.job.stage, step, steps):
            loss: Tensor = super().training_step(*args, **kwargs)
        training.parts.append(loss)
        return loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's loader, or the task's own batches, one by one."""
        if self.training.batches is None:
            return super().get_train_dataloader()  # type: ignore[no-any-return]
        loader = DataLoader(self.training.batches, batch_size=1, collate_fn=_only)
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return None if self.training.batches is not None else super()._get_num_items_in_batch(batch_samples, device)

    def floating_point_ops(self, inputs: Any) -> Any:
        """The Trainer's count; 0 for batches that only the task reads."""
        return 0 if self.training.batches is not None else super().floating_point_ops(inputs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer; the losses come last and mark a complete checkpoint."""
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            content = {"format": LOSSES_FORMAT, "version": 1, "losses": self.training.losses}
            write_json(folder / LOSSES, content)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the trained parameters and the adapters, and nothing of the base."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / TRAINED, own_tensors(self.model), {"task": self.training.job.stage.task.name})

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, tensors = Path(resume_from_checkpoint), own_tensors(self.model)
        saved, _ = read_tensors(folder / TRAINED)
        if differing := sorted(saved.keys() ^ tensors.keys()):
            raise FileError(f"{folder / TRAINED} does not fit the model: {listed(differing, 5)}")
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        self.training.losses[:] = step_losses(folder) or []


def task_trainer(base: type[Trainer]) -> type[Trainer]:
    """The subclass of a Trainer class that trains one task."""
    return type(base.__name__, (TaskMethods, base), {})


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains and every tensor of the adapters, by name."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, adapter in adapters_of(model).items():
        tensors.update({f"{name}.{key}": tensor.detach() for key, tensor in adapter.own_tensors()})
    return tensors


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a task; None where there is none."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and step_losses(path) is not None:
            found[int(number)] = path
    return found[max(found)] if found else None


def step_losses(checkpoint: Path) -> list[float] | None:
    """The losses up to a checkpoint, one per step; None where it is incomplete."""
    with suppress(FileError, FileNotFoundError):
        losses = read_json(checkpoint / LOSSES, expected=LOSSES_FORMAT)["losses"]
        if isinstance(losses, list) and f"checkpoint-{len(losses)}" == checkpoint.name:
            return [float(loss) for loss in losses]
    return None


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item
