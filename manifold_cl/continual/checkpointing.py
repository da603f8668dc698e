"""Activations that are computed again in the backward pass, under the name that the installed transformers uses."""

from __future__ import annotations

from collections.abc import Callable
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
