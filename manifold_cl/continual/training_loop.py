"""Training of one task: steps, gradient accumulation, ranks, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.continual.environment import Clock
from manifold_cl.continual.losses import nonfinite_remedy
from manifold_cl.continual.method import Method
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import Task
from manifold_cl.continual.training import Training
from manifold_cl.linalg import is_finite
from manifold_cl.optim import clip_riemannian_grad_norm_
from manifold_cl.optim.riemannian import RiemannianStep


def warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: float) -> LambdaLR:
    """A schedule that rises linearly over the share ``warmup`` of the steps, then falls as a cosine to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return LambdaLR(optimizer, factor)


def _report_nothing(step: int, steps: int, loss: float) -> None:
    pass


@dataclass(frozen=True)
class TrainingJob:
    """The training of one task: what it takes besides the model.

    Args:
        method: makes the optimizer, and may change the loss.
        stage: the task and its index.
        training: options that are the same for all methods.
        ranks: the processes that train together.
        additional: parameters that train beside the adapters.
        clock: gets the share ``"optimizer"``.
        on_step: called with (step, steps, loss).
    """

    method: Method
    stage: Stage
    training: Training
    ranks: Ranks = field(default_factory=Ranks.current)
    additional: AdditionalParameters | None = None
    clock: Clock = field(default_factory=Clock)
    on_step: Callable[[int, int, float], None] = _report_nothing


class TrainingLoop:
    """The project's own loop, as a run uses it. A trainer of another library takes its place in a subclass."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model on its device, frozen: parameters that nobody asked to train would be in no file of the run."""
        return model.to(device).requires_grad_(False)

    def passes(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which a method prepares or ends a task: its passes over the data run here."""
        return nullcontext()

    def evaluation(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which tasks are evaluated."""
        return nullcontext()

    def train(self, model: nn.Module, job: TrainingJob) -> list[float]:
        """Train one task; the loss of every step.

        A step takes ``accumulation`` batches on every rank and follows their mean loss. The last step of an epoch takes
        the remaining batches. All ranks draw the same order, and each computes its share. ``clock`` gets the share
        ``"optimizer"``, and ``on_step`` is called with (step, steps, loss).

        Raises:
            ValueError: when the task has no training examples.
            FloatingPointError: when the loss, a gradient or a trained parameter is no longer finite.
        """
        method, stage, training, ranks = job.method, job.stage, job.training, job.ranks
        epochs, batches_per_step = training.epochs_of(stage.index), training.accumulation * ranks.count
        steps = epochs * math.ceil(stage.task.batch_count("train", training.batch_size) / batches_per_step)
        if not steps:
            raise ValueError(f"task {stage.task.name} has no training examples")
        optimizer = method.make_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] *= training.rate_of(stage.index)
        if job.additional is not None:
            job.additional.add_to(optimizer, model, stage.index)
        schedule = warmup_cosine(optimizer, steps, warmup=training.warmup)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        ranks.broadcast(trained)
        losses: list[float] = []
        for epoch in range(epochs):
            order = stage.generator(f"order {epoch}")
            taken = 0
            batches = iter(stage.task.batches("train", batch_size=training.batch_size, generator=order))
            while group_of_batches := list(islice(batches, batches_per_step)):
                taken += len(group_of_batches)
                optimizer.zero_grad(set_to_none=True)
                mean = 0.0
                with method.step_context(model, stage, len(losses) + 1, steps):
                    for batch in ranks.share(group_of_batches):
                        loss = method.loss(model, stage.task, batch)
                        loss = loss / len(group_of_batches) if len(group_of_batches) > 1 else loss
                        loss.backward()  # type: ignore[no-untyped-call]
                        mean += float(loss.detach())
                losses.append(sum(ranks.all_gather(mean)))
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"the loss of {stage.task.name} became {losses[-1]} at step {len(losses)}: "
                        f"{nonfinite_remedy(losses[-1], group_of_batches, trained)}; the finished tasks are kept"
                    )
                ranks.sum_gradients(trained)
                if training.clip is not None:
                    _clip(optimizer, trained, training.clip)
                with job.clock.share("optimizer"), divergence_named(stage.task.name, len(losses), trained):
                    optimizer.step()
                schedule.step()
                job.on_step(len(losses), steps, losses[-1])
            _validate_count(stage.task, taken, training.batch_size)
        # The next loss shows what other steps did; no loss follows the last step.
        if not all_finite(trained):
            raise diverged(f"the parameters that {stage.task.name} trained", len(losses))
        ranks.validate_equal(trained, f"the parameters that {stage.task.name} trained")
        return losses


def _validate_count(task: Task, taken: int, batch_size: int) -> None:
    """Raise ValueError where a pass had another number of batches than the schedule of rates was made for."""
    if taken != (count := task.batch_count("train", batch_size)):
        raise ValueError(
            f"a pass over the training examples of {task.name} had {taken} batches of {batch_size}, and its size, "
            f"{task.size('train')}, means {count}: size() and batches() count the same examples, and every call of "
            "batches() starts a new pass"
        )


def _clip(optimizer: Optimizer, trained: Sequence[nn.Parameter], norm: float) -> None:
    """Limit the gradient in the norm that the step follows: Riemannian on manifolds."""
    if isinstance(optimizer, RiemannianStep):
        clip_riemannian_grad_norm_(optimizer, norm)
    else:
        torch.nn.utils.clip_grad_norm_(trained, norm)


@contextmanager
def divergence_named(task: str, step: int, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Raises FloatingPointError for an error of the optimizer that comes from NaN; other errors pass."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # a LinAlgError is a RuntimeError
        if all_finite(trained) and all_finite(p.grad for p in trained if p.grad is not None):
            raise
        raise diverged(f"gradients of {task}", step) from error


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(is_finite(tensor) for tensor in tensors)


def diverged(what: str, step: int) -> FloatingPointError:
    """The error for values that are no longer finite."""
    remedy = "lower the learning rate; the finished tasks are kept, and nothing of this one"
    return FloatingPointError(f"{what} have NaN or infinite entries at step {step}: {remedy}")
