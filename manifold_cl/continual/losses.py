"""Losses of a task's training examples or of a user's batches, and the likely cause of one that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from manifold_cl.continual.task import Task

_B = TypeVar("_B")

WINDOW, RISE, ABOVE = 3, 2.0, 1.2
"""Steps in a mean, and how far it rises in a training that diverged: over the lowest mean so far, and over the first
loss. In 308 trainings that did not diverge (``benchmarks/results``) it did so once."""

Losses = Callable[[], Iterable[Callable[[], Tensor]]]
"""Starts a pass over the data: one function per batch that computes its loss; the same batches in every pass."""

IGNORED = -100
"""The label that cross-entropy leaves out in torch and transformers."""


def start_pass(losses: Losses) -> Iterable[Callable[[], Tensor]]:
    """The losses of the batches in a new pass; TypeError for losses that are no function, since a pass starts anew."""
    if not callable(losses):
        raise TypeError(
            f"losses is a function that starts a pass over the data, got {type(losses).__name__}: give "
            "lambda: [one function per batch that returns its loss]"
        )
    batches = losses()
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"losses is a function that starts a pass over the data, and this one returned a {type(batches).__name__}: "
            "for one batch give lambda: [LOSS], with the function LOSS that returns its loss"
        )
    return batches


def task_losses(
    model: nn.Module, task: Task | Iterable[Any], *, examples: int, batch_size: int = 16, seed: int = 0
) -> Losses:
    """Losses of the same ``examples`` training examples in every pass, for `grow_memory` and its neighbours.

    Args:
        model: computes the loss.
        task: a task, whose examples are drawn at random; or batches, such as a ``DataLoader``, of dictionaries with
            the model's arguments, from which the model returns its loss as ``.loss``. The first batches are taken in
            their order and kept for the next pass.
        examples: number of examples, rounded up to whole batches.
        batch_size: examples per batch of a task.
        seed: of the draw from a task.

    Raises:
        TypeError: for anything else than a task or an iterable of dictionaries that hold tensors.
    """
    if isinstance(task, Task):

        def start() -> Iterator[Callable[[], Tensor]]:
            draw = torch.Generator().manual_seed(seed)
            batches = task.batches("train", batch_size=batch_size, generator=draw)
            for batch in _first(batches, examples, lambda *_: batch_size):
                yield partial(task.loss, model, batch)

        return start
    if isinstance(task, Mapping | str | Tensor) or not isinstance(task, Iterable):
        raise TypeError(
            f"a task or its batches are needed, got a {type(task).__name__}: give a Task, or a list or DataLoader "
            "of dictionaries with the model's arguments, labels among them"
        )
    kept: list[Mapping[str, Any]] = []

    def restart() -> Iterator[Callable[[], Tensor]]:
        if not kept:
            kept.extend(_first(task, examples, _batch_size))
        for index, batch in enumerate(kept):
            yield partial(_model_loss, model, batch, index)

    return restart


def nonfinite_remedy(loss: float, batches: Iterable[Any], trained: Iterable[Tensor]) -> str:
    """The likely cause of a loss of these batches and trained parameters that is not finite, and what to do."""
    labels = [b.get("labels") if isinstance(b, Mapping) else getattr(b, "labels", None) for b in batches]
    if any(isinstance(each, Tensor) and each.numel() and bool((each == IGNORED).all()) for each in labels):
        return (
            f"every label of a batch is {IGNORED}, so that its loss is a mean over nothing: mask fewer labels, "
            "truncate examples at a greater length, or leave such examples out"
        )
    if math.isnan(loss) and all(bool(p.isfinite().all()) for p in trained):
        return (
            "lower the learning rate, or, as every trained parameter is finite, look for a batch without anything to "
            f"learn (all labels {IGNORED}, no examples)"
        )
    return "lower the learning rate"


def _first(batches: Iterable[_B], examples: int, size: Callable[[int, _B], int]) -> Iterator[_B]:
    """The first batches that hold ``examples`` examples; no further batch is taken from the source."""
    source = enumerate(batches)
    while examples > 0 and (item := next(source, None)) is not None:
        examples -= size(*item)
        yield item[1]


def _batch_size(index: int, batch: Any) -> int:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch {index} is a {type(batch).__name__}: a dictionary of the model's arguments is needed, such as "
            "input_ids and labels; for any other kind of batch, write a Task with a loss"
        )
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        kinds = ", ".join(f"{key} is a {type(value).__name__}" for key, value in batch.items()) or "it is empty"
        raise TypeError(
            f"batch {index} holds no tensors ({kinds}): collate the examples first, as "
            "DataLoader(dataset, batch_size=..., collate_fn=...) does"
        )
    return len(tensors[0])


def _model_loss(model: nn.Module, batch: Mapping[str, Any], index: int) -> Tensor:
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the model returned no loss for batch {index} (its arguments are {', '.join(batch)}): put labels into "
            "the batch, or write a Task with a loss"
        )
    return loss


def divergence(losses: Sequence[float], first: float) -> tuple[int, float, float] | None:
    """The worst rise of a training's loss above the value at which it began, although every loss is finite.

    Losses are means of three steps. A rise is to twice the lowest mean before it, and to 1.2 times ``first``.

    >>> divergence([8.6, 3.2, 2.2, 2.1, 8.7, 14.0, 12.3, 4.3, 1.6], 8.6)
    (7, 2.5, 11.666666666666666)
    >>> divergence([0.2, 0.1, 0.1, 0.3, 0.1, 0.1], 0.2) is None
    True

    Args:
        losses: of every step of one task.
        first: the loss that a training began with.

    Returns:
        The last step of the highest mean, from 1, the lowest mean before it, and the highest one; None without a rise.
    """
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]
    lowest, worst = math.inf, None
    for step, mean in enumerate(means, WINDOW):
        if mean > RISE * lowest and mean > ABOVE * first and (worst is None or mean > worst[2]):
            worst = (step, lowest, mean)
        lowest = min(lowest, mean)
    return worst
