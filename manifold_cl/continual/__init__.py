"""The sequence of tasks: streams, memory, methods, the runner and its record."""

from manifold_cl.continual.companions import Companions
from manifold_cl.continual.method import Method
from manifold_cl.continual.methods import METHODS, make_method, register_method
from manifold_cl.continual.ranks import Ranks
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
    all_reduce,
    gather,
    grown,
    leading_directions,
    losses_of,
    reliances,
    task_directions,
    with_weights,
)
from manifold_cl.continual.task import Task, TaskStream
from manifold_cl.continual.training import Training

__all__ = [
    "METHODS",
    "CapacityError",
    "Companions",
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
    "all_reduce",
    "gather",
    "grown",
    "leading_directions",
    "losses_of",
    "make_method",
    "register_method",
    "reliances",
    "task_directions",
    "with_weights",
]
