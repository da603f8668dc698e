"""Studies: methods × seeds × task orders on equal terms, each combination a run that survives being killed."""

from manifold_cl.study.config import check_on_model, read_plan
from manifold_cl.study.estimate import Estimate, estimate
from manifold_cl.study.plan import Cell, Entry, StudyPlan
from manifold_cl.study.supervisor import CellFailure, Event, Study

__all__ = [
    "Cell",
    "CellFailure",
    "Entry",
    "Estimate",
    "Event",
    "Study",
    "StudyPlan",
    "check_on_model",
    "estimate",
    "read_plan",
]
