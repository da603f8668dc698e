"""The lab: retractions and steps at work on problems whose optimum is known."""

from typing import TYPE_CHECKING

from manifold_cl.lab.registry import PROBLEMS, STEPS
from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.lab.contestants import as_plugin, entrants
    from manifold_cl.lab.meter import Meter
    from manifold_cl.lab.performance_profiles import profile
    from manifold_cl.lab.problems import Problem
    from manifold_cl.lab.runs import Budget, Contestant
    from manifold_cl.lab.steps import FunctionStep, OptimizerStep, Setting, Step
    from manifold_cl.lab.suite import SuiteReport, run_suite
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "PROBLEMS",
    "STEPS",
    "Budget",
    "Contestant",
    "FunctionStep",
    "Meter",
    "OptimizerStep",
    "Problem",
    "Setting",
    "Step",
    "SuiteReport",
    "as_plugin",
    "entrants",
    "profile",
    "run_suite",
]
