"""How a task is trained: batches, steps, the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import islice
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from manifold_cl.continual.checks import check_number, check_positive, check_share, check_whole
from manifold_cl.continual.companions import Companions
from manifold_cl.continual.lost_loss import remedy_for
from manifold_cl.continual.method import Method, Stage
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.task import Split
from manifold_cl.optim import clip_riemannian_grad_norm_
from manifold_cl.optim.riemannian import RiemannianStep

_T = TypeVar("_T")

ALWAYS = ("epochs", "batch_size", "warmup", "seed", "evaluate_on")
"""Fields that every record's configuration has; others only where they differ from their default."""


@dataclass(frozen=True)
class Training:
    """How every task is trained, the same for all methods.

    Args:
        epochs: passes over a task's training split, one number for all tasks or one for each.
        batch_size: examples in one forward pass of one rank.
        warmup: share of the steps over which the learning rate rises linearly; then it falls as a cosine to 0.
        seed: of everything random in the run; data selection has its own, fixed one.
        evaluate_on: the split that scores come from; ``"validation"`` while tuning.
        accumulation: batches a rank whose gradients make one step.
        clip: largest norm of the gradient over all that trains, Riemannian on manifolds; not limited by default.
        rates: factor on the method's learning rates for each task; 1 for all by default.
    """

    epochs: int | tuple[int, ...] = 1
    batch_size: int = 16
    warmup: float = 0.1
    seed: int = 0
    evaluate_on: Split = "test"
    accumulation: int = 1
    clip: float | None = None
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "rates"):
            if isinstance(given := getattr(self, name), list):  # as files have them
                object.__setattr__(self, name, tuple(given))
        for epochs in self.epochs if isinstance(self.epochs, tuple) else (self.epochs,):
            check_whole("epochs", epochs)
        if not isinstance(self.rates, tuple):
            raise TypeError(f"rates has one factor for each task, got {self.rates!r}")
        for rate in self.rates:
            check_number("rates", rate, least=0.0)
        for name in ("batch_size", "accumulation"):
            check_whole(name, getattr(self, name))
        check_share("warmup", self.warmup, zero=True)
        if self.evaluate_on not in get_args(Split):
            raise ValueError(f"evaluate_on is {', '.join(get_args(Split))}, got {self.evaluate_on!r}")
        if self.clip is not None:
            check_positive("clip", self.clip)

    def check(self, tasks: int) -> None:
        """Refuse lists of another length than the number of tasks."""
        for name in ("epochs", "rates"):
            given = getattr(self, name)
            if isinstance(given, tuple) and (given or name == "epochs") and len(given) != tasks:
                raise ValueError(f"{name} has {len(given)} entries for {tasks} tasks: give one for each")

    def epochs_of(self, task: int) -> int:
        """Epochs of task number ``task``."""
        return self.epochs[task] if isinstance(self.epochs, tuple) else self.epochs

    def rate_of(self, task: int) -> float:
        """Factor on the learning rates of task number ``task``."""
        return self.rates[task] if self.rates else 1.0

    def plain(self) -> dict[str, Any]:
        """The configuration's entries."""
        default = {entry.name: entry.default for entry in fields(self) if entry.default is not MISSING}
        return {k: v for k, v in asdict(self).items() if k in ALWAYS or v != default[k]}


def warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: float) -> LambdaLR:
    """A schedule that rises linearly over the share ``warmup`` of the steps, then falls as a cosine to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return LambdaLR(optimizer, factor)


def train(
    model: nn.Module,
    method: Method,
    stage: Stage,
    training: Training,
    *,
    ranks: Ranks,
    companions: Companions | None,
    timed: Callable[[], AbstractContextManager[object]],
    on_step: Callable[[int, int, float], None],
) -> list[float]:
    """The loss of every step of one task.

    A step takes ``accumulation`` batches on every rank and follows their mean loss; the last one of an epoch takes
    what is left. All ranks draw the same order and compute their share of it.

    Args:
        model: with what `Method.begin_task` put into it.
        method: makes the optimizer and the loss.
        stage: the task.
        training: how.
        ranks: this process among all.
        companions: what trains beside the adapters.
        timed: makes the context that the optimizer's step runs in.
        on_step: called with (step, steps, loss).

    Raises:
        ValueError: when the task has no training examples.
        FloatingPointError: when the loss, a gradient or what is trained is no longer finite.
    """
    epochs, together = training.epochs_of(stage.index), training.accumulation * ranks.count
    steps = epochs * math.ceil(stage.task.batch_count("train", training.batch_size) / together)
    if not steps:
        raise ValueError(f"task {stage.task.name} has no training examples")
    optimizer = method.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] *= training.rate_of(stage.index)
    if companions is not None:
        companions.join(optimizer, model, stage.index)
    schedule = warmup_cosine(optimizer, steps, warmup=training.warmup)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    ranks.broadcast(trained)
    losses: list[float] = []
    for epoch in range(epochs):
        order = stage.generator(f"order {epoch}")
        batches = stage.task.batches("train", batch_size=training.batch_size, generator=order)
        for taken in _grouped(batches, together):
            optimizer.zero_grad(set_to_none=True)
            mean = 0.0
            for batch in ranks.share(taken):
                loss = method.loss(model, stage.task, batch)
                loss = loss / len(taken) if len(taken) > 1 else loss
                loss.backward()  # type: ignore[no-untyped-call]
                mean += float(loss.detach())
            losses.append(sum(ranks.gathered(mean)))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss of {stage.task.name} became {losses[-1]} at step {len(losses)}: "
                    f"{remedy_for(losses[-1], taken, trained)}; the finished tasks are kept"
                )
            ranks.sum_gradients(trained)
            if training.clip is not None:
                _clip(optimizer, trained, training.clip)
            with timed(), _divergence_named(stage.task.name, len(losses), trained):
                optimizer.step()
            schedule.step()
            on_step(len(losses), steps, losses[-1])
    # Of all other steps, the next loss shows it.
    if not _finite(trained):
        raise FloatingPointError(_diverged(f"the parameters that {stage.task.name} trained", len(losses)))
    ranks.check_equal(trained, f"the parameters that {stage.task.name} trained")
    return losses


def _clip(optimizer: Optimizer, trained: Sequence[nn.Parameter], norm: float) -> None:
    """Limit the gradient in the norm that the step follows: Riemannian on manifolds."""
    if isinstance(optimizer, RiemannianStep):
        clip_riemannian_grad_norm_(optimizer, norm)
    else:
        torch.nn.utils.clip_grad_norm_(trained, norm)


@contextmanager
def _divergence_named(task: str, step: int, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Turns what an optimizer raises about NaN into a divergence; its other errors pass.

    Raises:
        FloatingPointError: when a gradient or a parameter is not finite.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:  # a LinAlgError is a RuntimeError
        if _finite(trained) and _finite(p.grad for p in trained if p.grad is not None):
            raise
        raise FloatingPointError(_diverged(f"gradients of {task}", step)) from error


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.detach().isfinite().all()) for tensor in tensors)


def _diverged(what: str, step: int) -> str:
    return (
        f"{what} have NaN or infinite entries at step {step}: lower the learning rate; the finished tasks are "
        "kept, and nothing of this one"
    )


def _grouped(batches: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of ``size`` batches, the last one shorter."""
    source = iter(batches)
    while group := list(islice(source, size)):
        yield group
