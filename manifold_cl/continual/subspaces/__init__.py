"""Protected directions: measured in passes over the data, held in a memory, and grown task by task.

Imports only `Task` and its losses from the rest of `manifold_cl.continual`. Methods import it; the runner does not.
"""

from manifold_cl.continual.subspaces.capacity import CapacityError, LayerGrowth, Policy
from manifold_cl.continual.subspaces.costs import memory_pass_nbytes, start_pass_nbytes
from manifold_cl.continual.subspaces.directions import (
    leading_directions,
    measure_importance,
    measure_input_moments,
    task_directions,
)
from manifold_cl.continual.subspaces.during import TrainingStatistics
from manifold_cl.continual.subspaces.gradient_sketches import (
    GradientSketch,
    Probes,
    RangeSketch,
    RefinedSketch,
    SingularTriplets,
)
from manifold_cl.continual.subspaces.growth import grow_memory, grow_memory_from_weights, parse_sources, without_updates
from manifold_cl.continual.subspaces.hooks import PassReport, collect_statistics, hooked
from manifold_cl.continual.subspaces.input_moments import InputMoment, InputSketch
from manifold_cl.continual.subspaces.layer_columns import Columns
from manifold_cl.continual.subspaces.memory import SubspaceMemory
from manifold_cl.continual.subspaces.passes import START, Passes
from manifold_cl.continual.subspaces.statistic import Directions, Statistic, all_reduce

__all__ = [
    "START",
    "CapacityError",
    "Columns",
    "Directions",
    "GradientSketch",
    "InputMoment",
    "InputSketch",
    "LayerGrowth",
    "PassReport",
    "Passes",
    "Policy",
    "Probes",
    "RangeSketch",
    "RefinedSketch",
    "SingularTriplets",
    "Statistic",
    "SubspaceMemory",
    "TrainingStatistics",
    "all_reduce",
    "collect_statistics",
    "grow_memory",
    "grow_memory_from_weights",
    "hooked",
    "leading_directions",
    "measure_importance",
    "measure_input_moments",
    "memory_pass_nbytes",
    "parse_sources",
    "start_pass_nbytes",
    "task_directions",
    "without_updates",
]
