"""Studies: methods × seeds × task orders on equal terms, each combination a run that resumes after interruptions."""

from manifold_cl.study.config import read_plan, validate_on_model
from manifold_cl.study.engine import ENGINES, Engine, LocalEngine, make_engine
from manifold_cl.study.estimate import Costs, Estimate, estimate, time_left
from manifold_cl.study.events import CellFailure, Event
from manifold_cl.study.plan import Cell, MethodEntry, StudyPlan
from manifold_cl.study.supervisor import Study
from manifold_cl.study.trials import Resources, Search, SearchGroup, read_searches

__all__ = [
    "ENGINES",
    "Cell",
    "CellFailure",
    "Costs",
    "Engine",
    "Estimate",
    "Event",
    "LocalEngine",
    "MethodEntry",
    "Resources",
    "Search",
    "SearchGroup",
    "Study",
    "StudyPlan",
    "estimate",
    "make_engine",
    "read_plan",
    "read_searches",
    "time_left",
    "validate_on_model",
]
