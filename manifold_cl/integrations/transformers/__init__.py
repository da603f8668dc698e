"""Continual learning in transformers' ``Trainer`` and its subclasses, and a callback that logs the geometry."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.integrations.transformers.continual_trainer import ContinualTrainer
    from manifold_cl.integrations.transformers.geometry_log import TrainerGeometryCallback, log_geometry
    from manifold_cl.integrations.transformers.watch_callback import TrainerWatchCallback, watch_training
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["ContinualTrainer", "TrainerGeometryCallback", "TrainerWatchCallback", "log_geometry", "watch_training"]
