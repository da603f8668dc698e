"""The sequence of tasks: streams, memory, methods, the runner and its record."""

from manifold_cl.continual import methods as _methods  # registers every method
from manifold_cl.continual.companions import Companions
from manifold_cl.continual.memory import SubspaceMemory
from manifold_cl.continual.method import METHODS, Method, make_method, register_method
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.record import RunRecord
from manifold_cl.continual.runner import ContinualRunner
from manifold_cl.continual.sketches import GradientSketch, InputMoment, gather
from manifold_cl.continual.task import Task, TaskStream
from manifold_cl.continual.training import Training

__all__ = [
    "METHODS",
    "Companions",
    "ContinualRunner",
    "GradientSketch",
    "InputMoment",
    "Method",
    "Ranks",
    "RunRecord",
    "SubspaceMemory",
    "Task",
    "TaskStream",
    "Training",
    "gather",
    "make_method",
    "register_method",
]

del _methods
