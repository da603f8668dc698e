"""A callback for transformers' ``Trainer`` that measures adapters every few steps, such as with a TrainingWatch."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manifold_cl.integrations.watching import Watch, watch_model


class TrainerWatchCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures the model at the steps of a `Watch`, and passes the numbers to the reporters and the log history.

    Only the main process measures. Add it with `watch_training`.
    """

    def __init__(self, watch: Watch, trainer: Trainer) -> None:
        self.watch, self._trainer = watch, trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Measure and report, after the optimizer's step."""
        if model is None or not state.is_world_process_zero or not self.watch.due(state.global_step):
            return
        numbers = watch_model(self.watch, model, state.global_step)
        if state.epoch is not None:
            numbers["epoch"] = state.epoch
        state.log_history.append({**numbers, "step": state.global_step})
        # Trainer.log would count tokens over all processes, and the others are not here
        self._trainer.callback_handler.on_log(args, state, control, numbers)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the last page."""
        if state.is_world_process_zero:
            self.watch.finish()


def watch_training(trainer: Trainer, watch: Watch) -> TrainerWatchCallback:
    """Make ``trainer`` measure its model at the steps of ``watch``, and log the numbers to ``report_to``."""
    callback = TrainerWatchCallback(watch, trainer)
    trainer.add_callback(callback)
    return callback
