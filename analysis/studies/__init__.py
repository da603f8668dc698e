"""Studies: what ``study.json`` and its cells say, as tables with intervals over runs and paired tests."""

from analysis.studies.folder import Cell, Plan, Planned, Unfinished
from analysis.studies.study import TIMES, Study

__all__ = ["TIMES", "Cell", "Plan", "Planned", "Study", "Unfinished"]
