"""Lightning callbacks that log the geometry of the adapters, or measure them, to the loggers of the ``Trainer``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from manifold_cl.adapters import geometry_metrics
from manifold_cl.integrations.watching import Watch, watch_model


class GeometryCallback(Callback):  # type: ignore[misc]  # skipped by the type checker
    """Logs `geometry_metrics` of the module, with ``prefix`` before each name, every ``log_every_n_steps`` steps."""

    def __init__(self, *, prefix: str = "geometry/") -> None:
        self.prefix = prefix
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the steps of an earlier training with the same callback."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure after a step that is logged: once per step, however many batches it takes."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if every and step != self._last_step and step % every == 0:
            self._last_step = step
            pl_module.log_dict(geometry_metrics(pl_module, prefix=self.prefix))


class WatchCallback(Callback):  # type: ignore[misc]  # skipped by the type checker
    """Measures the module at the steps of a `Watch`, such as a TrainingWatch of analysis, for all loggers.

    Only the main process measures.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the steps of an earlier training with the same callback."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure after a step that is due: once per step, however many batches it takes."""
        step = trainer.global_step
        if step == self._last_step or not trainer.is_global_zero or not self.watch.due(step):
            return
        self._last_step = step
        numbers = watch_model(self.watch, pl_module, step)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last page."""
        if trainer.is_global_zero:
            self.watch.finish()
