"""Losses of plain batches: dictionaries of a model's arguments, as data loaders and trainers have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from manifold_cl.continual.subspaces.passes import Losses


def batch_losses(model: nn.Module, batches: Iterable[Any], *, examples: int) -> Losses:
    """Passes over ``model(**batch).loss`` of the first batches that hold ``examples`` examples.

    Raises:
        TypeError: for what is no iterable of dictionaries.
    """
    if isinstance(batches, Mapping | str | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"a task or its batches are needed, got a {type(batches).__name__}: give a Task, or a list or DataLoader "
            "of dictionaries with the model's arguments, labels among them"
        )
    held: list[Mapping[str, Any]] = []

    def start() -> Iterator[Callable[[], Tensor]]:
        if not held:
            held.extend(_taken(batches, examples))
        for position, batch in enumerate(held):
            yield partial(_loss, model, batch, position)

    return start


def _taken(batches: Iterable[Any], examples: int) -> Iterator[Mapping[str, Any]]:
    seen = 0
    if examples < 1:
        return
    for position, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batch {position} is a {type(batch).__name__}: a dictionary of the model's arguments is needed, such "
                "as input_ids and labels; for any other kind of batch, write a Task with a loss"
            )
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        if not tensors:
            kinds = ", ".join(f"{key} is a {type(value).__name__}" for key, value in batch.items()) or "it is empty"
            raise TypeError(
                f"batch {position} holds no tensors ({kinds}): collate the examples first, as "
                "DataLoader(dataset, batch_size=..., collate_fn=...) does"
            )
        yield batch
        seen += len(tensors[0])
        if seen >= examples:  # now, so that no batch is taken from the source in vain
            return


def _loss(model: nn.Module, batch: Mapping[str, Any], position: int) -> Tensor:
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the model returned no loss for batch {position} (its arguments are {', '.join(batch)}): put labels into "
            "the batch, or write a Task with a loss"
        )
    return loss
