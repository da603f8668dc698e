"""A Lightning callback that logs the geometry of the adapters to the loggers of the ``Trainer``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from manifold_cl.adapters import geometry_metrics


class GeometryCallback(Callback):  # type: ignore[misc]  # skipped by the type checker
    """Logs `geometry_metrics` of the module, with ``prefix`` before each name, every ``log_every_n_steps`` steps."""

    def __init__(self, *, prefix: str = "geometry/") -> None:
        self.prefix = prefix
        self._last_step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure after a step that is logged: once per step, however many batches it takes."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if every and step != self._last_step and step % every == 0:
            self._last_step = step
            pl_module.log_dict(geometry_metrics(pl_module, prefix=self.prefix))
