"""Refusal of models with weights that are NaN or infinite, before a run and after each merge."""

from __future__ import annotations

from torch import nn


def validate_finite_weights(model: nn.Module) -> None:
    """Raise ValueError for a pre-trained model with a weight that is not finite, by its name."""
    if (name := _nonfinite(model)) is not None:
        raise ValueError(
            f"the weight {name} of the pre-trained model has NaN or infinite entries: use an intact checkpoint, and "
            "load it in float32 or bfloat16, since float16 ends at 65504"
        )


def require_finite_weights(model: nn.Module, moment: str) -> None:
    """Raise FloatingPointError for a model with a weight that is not finite; ``moment`` ends the message's subject.

    A merge may overflow in half precision, and scores of such a model may be numbers nevertheless.
    """
    if (name := _nonfinite(model)) is not None:
        raise FloatingPointError(
            f"{name} has NaN or infinite entries after {moment}: lower the learning rate, or merge in float32; the "
            "finished tasks are kept"
        )


def _nonfinite(model: nn.Module) -> str | None:
    """Name of the first parameter with an entry that is not finite. Packed weights have no entries to read."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.element_size() > 1 and not bool(p.detach().isfinite().all()):
            return name
    return None
