"""Continual learning: streams of tasks, memory, methods, the runner and its record."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.continual.additional_parameters import AdditionalParameters
    from manifold_cl.continual.losses import task_losses
    from manifold_cl.continual.method import Method
    from manifold_cl.continual.methods import METHODS, make_method, register_method
    from manifold_cl.continual.methods.task_start import start_from_task
    from manifold_cl.continual.ranks import Ranks
    from manifold_cl.continual.rates import searched_rates
    from manifold_cl.continual.record import RunRecord
    from manifold_cl.continual.runner import ContinualRunner
    from manifold_cl.continual.subspaces import (
        CapacityError,
        Directions,
        GradientSketch,
        InputMoment,
        InputSketch,
        LayerGrowth,
        Passes,
        SubspaceMemory,
        TrainingStatistics,
        all_reduce,
        collect_statistics,
        grow_memory,
        grow_memory_from_weights,
        leading_directions,
        measure_importance,
        task_directions,
    )
    from manifold_cl.continual.task import Task, TaskStream
    from manifold_cl.continual.training import Training
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "METHODS",
    "AdditionalParameters",
    "CapacityError",
    "ContinualRunner",
    "Directions",
    "GradientSketch",
    "InputMoment",
    "InputSketch",
    "LayerGrowth",
    "Method",
    "Passes",
    "Ranks",
    "RunRecord",
    "SubspaceMemory",
    "Task",
    "TaskStream",
    "Training",
    "TrainingStatistics",
    "all_reduce",
    "collect_statistics",
    "grow_memory",
    "grow_memory_from_weights",
    "leading_directions",
    "make_method",
    "measure_importance",
    "register_method",
    "searched_rates",
    "start_from_task",
    "task_directions",
    "task_losses",
]
