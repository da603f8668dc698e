"""Measurements of a model at some steps: the object that the callbacks call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from manifold_cl.adapters import eblora_layers, geometry_metrics


class Watch(Protocol):
    """Measures a model at some steps, as ``analysis.TrainingWatch`` does."""

    def due(self, step: int) -> bool:
        """Whether a measurement belongs to this step."""

    def measure(self, model: nn.Module, step: int, *, extra: Mapping[str, float] | None = None) -> dict[str, float]:
        """Numbers for the loggers; `extra` are further numbers for the log."""

    def finish(self) -> None:
        """Called at the end of the training."""


def watch_model(watch: Watch, model: nn.Module, step: int) -> dict[str, float]:
    """The numbers of one measurement, with `geometry_metrics` of a model that has frames."""
    extra = geometry_metrics(model) if eblora_layers(model) else {}
    return {**watch.measure(model, step, extra=extra), **extra}
