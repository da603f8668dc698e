"""Studies: methods × seeds × task orders on equal terms, each combination a run that resumes after interruptions."""

from manifold_cl.study.config import read_plan, validate_on_model
from manifold_cl.study.estimate import Estimate, estimate
from manifold_cl.study.plan import Cell, MethodEntry, StudyPlan
from manifold_cl.study.supervisor import CellFailure, Event, Study

__all__ = [
    "Cell",
    "CellFailure",
    "Estimate",
    "Event",
    "MethodEntry",
    "Study",
    "StudyPlan",
    "estimate",
    "read_plan",
    "validate_on_model",
]
