"""A callback for transformers' ``Trainer`` that adds the geometry of the adapters to every training log."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manifold_cl.adapters import geometry_metrics


class TrainerGeometryCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Adds `geometry_metrics` of the model, with ``prefix`` before each name, to each training log and the log history.

    It must come before the callbacks that report, which Trainer puts first: add it with `log_geometry`.
    """

    def __init__(self, *, prefix: str = "geometry/") -> None:
        self.prefix = prefix

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, model: nn.Module | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Measure for logs of training; those of evaluation and the final summary stay as they are."""
        if logs is None or model is None or "loss" not in logs:
            return
        metrics = geometry_metrics(model, prefix=self.prefix)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)


def log_geometry(trainer: Trainer, *, prefix: str = "geometry/") -> TrainerGeometryCallback:
    """Make ``trainer`` log constraint residuals, spectral entropy, capacity and scale to its reporters (``report_to``).

    Measured once per training log (``logging_steps``); see `geometry_metrics` for the figures and their cost.
    """
    callback = TrainerGeometryCallback(prefix=prefix)
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop(callbacks.index(callback)))  # reporters read the logs in this order
    return callback
