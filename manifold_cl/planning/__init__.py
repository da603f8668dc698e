"""Memory of a training run before it starts, computed without weights."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.planning.advice import Saving
    from manifold_cl.planning.lines import MemoryPlan, PlanLine
    from manifold_cl.planning.planner import memory_plan
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["MemoryPlan", "PlanLine", "Saving", "memory_plan"]
