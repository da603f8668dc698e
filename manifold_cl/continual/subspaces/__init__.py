"""Protected directions: how they are found, held and grown, and what happens when a layer is full of them.

Of the sequence, this room knows what a task is and nothing else; the methods reach it, the runner does not.
"""

from manifold_cl.continual.subspaces.capacity import CapacityError, LayerGrowth, Policy, check_policy
from manifold_cl.continual.subspaces.covariance import InputMoment, InputSketch
from manifold_cl.continual.subspaces.extraction import (
    DATA_SOURCES,
    START,
    DataSource,
    leading_directions,
    losses_of,
    reliances,
    task_directions,
)
from manifold_cl.continual.subspaces.memory import PRETRAINING, Columns, SubspaceMemory
from manifold_cl.continual.subspaces.observing import Reading, gather
from manifold_cl.continual.subspaces.passes import Losses, Passes
from manifold_cl.continual.subspaces.signature import Signature
from manifold_cl.continual.subspaces.sketches import GradientSketch, Probes, RangeSketch, RefinedSketch
from manifold_cl.continual.subspaces.sources import (
    grown,
    sources_in,
    weight_directions,
    with_weights,
    without_updates,
)
from manifold_cl.continual.subspaces.statistic import Directions, Reliance, Statistic, all_reduce

__all__ = [
    "DATA_SOURCES",
    "PRETRAINING",
    "START",
    "CapacityError",
    "Columns",
    "DataSource",
    "Directions",
    "GradientSketch",
    "InputMoment",
    "InputSketch",
    "LayerGrowth",
    "Losses",
    "Passes",
    "Policy",
    "Probes",
    "RangeSketch",
    "Reading",
    "RefinedSketch",
    "Reliance",
    "Signature",
    "Statistic",
    "SubspaceMemory",
    "all_reduce",
    "check_policy",
    "gather",
    "grown",
    "leading_directions",
    "losses_of",
    "reliances",
    "sources_in",
    "task_directions",
    "weight_directions",
    "with_weights",
    "without_updates",
]
