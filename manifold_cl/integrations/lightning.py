"""For Lightning: the geometry of the adapters, logged by whatever loggers the ``Trainer`` has."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from manifold_cl.adapters import geometry_metrics


class GeometryCallback(Callback):  # type: ignore[misc]  # skipped by the type checker
    """Logs `geometry_metrics` of the module every ``log_every_n_steps`` steps.

    Args:
        prefix: in front of every name.
    """

    def __init__(self, *, prefix: str = "geometry/") -> None:
        self.prefix = prefix

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure after a step that is logged."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(geometry_metrics(pl_module, prefix=self.prefix))
