"""Continual learning in transformers' ``Trainer`` and its subclasses, and a callback that logs the geometry."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.integrations.transformers.continual_trainer import ContinualTrainer
    from manifold_cl.integrations.transformers.geometry_log import TrainerGeometryCallback, log_geometry
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["ContinualTrainer", "TrainerGeometryCallback", "log_geometry"]
