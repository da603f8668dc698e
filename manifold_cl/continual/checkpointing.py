"""Activations that are computed again in the backward pass, under the name that the installed transformers uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

NAMES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""Of the method of transformers, the present name first: it calls the earlier one with a warning."""

NOT_REENTRANT = {"use_reentrant": False}
"""Reentrant checkpoints need inputs with gradients, which a frozen embedding does not give."""


def checkpointing_method(model: nn.Module) -> Callable[[dict[str, Any]], None] | None:
    """The method of ``model`` that turns checkpointing on, called with torch's options; None where it has none."""
    return next((getattr(model, name) for name in NAMES if hasattr(model, name)), None)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute the activations of ``model`` in the backward pass, by checkpoints that are not reentrant.

    Raises:
        TypeError: a model without checkpoints, that is, not one of transformers.
    """
    enable = checkpointing_method(model)
    if enable is None:
        raise TypeError(f"{type(model).__name__} has no method for checkpoints of activations ({' or '.join(NAMES)})")
    enable(dict(NOT_REENTRANT))


@contextmanager
def following_checkpoints(model: nn.Module) -> Iterator[None]:
    """A context in which a model in evaluation mode uses its checkpoints, which transformers has in training only.

    Modules that checkpoint are in training mode, with a dropout of 0, and what they checkpoint runs in evaluation mode:
    results are those of the evaluation mode, and no dropout draws random numbers. The backward pass may come later.
    Nothing changes for a model in training mode.
    """
    with ExitStack() as stack:
        for module in () if model.training else model.modules():
            if not getattr(module, "gradient_checkpointing", False):
                continue
            replaced: dict[str, Any] = {
                name: 0.0 for name, value in vars(module).items() if "drop" in name and isinstance(value, float)
            }
            if (checkpoint := getattr(module, "_gradient_checkpointing_func", None)) is not None:
                replaced["_gradient_checkpointing_func"] = _in_evaluation_mode(module, checkpoint)
            for name, value in (("training", True), *replaced.items()):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield


def _in_evaluation_mode(module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The checkpoint, with the module in evaluation mode while its function runs, for the second time too."""

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def evaluate(*inputs: Any, **named: Any) -> Any:
            before, module.training = module.training, False
            try:
                return function(*inputs, **named)
            finally:
                module.training = before

        return checkpoint(evaluate, *args, **options)

    return call
