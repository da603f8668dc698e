"""Studies: ``study.json`` and its cells as tables, with intervals over runs and paired tests."""

from analysis.studies.results import TIMES, StudyResults
from analysis.studies.study_file import CellKey, StudyFile, StudyMethod, UnfinishedCell

__all__ = ["TIMES", "CellKey", "StudyFile", "StudyMethod", "StudyResults", "UnfinishedCell"]
