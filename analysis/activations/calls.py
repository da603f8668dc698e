"""Calls of any torch model on batches, and its modules by the names of an adapter's layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Tensor]
"""(model, batch) to outputs (..., classes)."""


def call_model(model: nn.Module, batch: Any) -> Tensor:
    """The model's outputs for a batch: a tensor, a mapping of keywords, or a tuple of arguments."""
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    output = model(**batch) if isinstance(batch, Mapping) else model(*arguments)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}: give forward=, (model, batch) to a tensor")
    return output


def example_count(batch: Any) -> int:
    """Number of examples in a batch: the first dimension of its first tensor; 1 where none has a dimension."""
    given = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return next((int(each.shape[0]) for each in given if isinstance(each, Tensor) and each.ndim), 1)


def named_modules(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Layer to the module of that name; ValueError for a layer that is no module of the model."""
    named = dict(model.named_modules())
    layers = list(layers)
    if missing := [layer for layer in layers if layer not in named]:
        raise ValueError(
            f"{len(missing)} of {len(layers)} layers are no modules of the model, the first is {missing[0]}; "
            f"its modules are called like {next((name for name in reversed(named) if name), 'nothing')}"
        )
    return {layer: named[layer] for layer in layers}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own mode put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
