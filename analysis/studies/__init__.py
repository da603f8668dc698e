"""Studies: what ``study.json`` and its cells say, as tables with intervals over runs and paired tests."""

from analysis.studies.results import TIMES, StudyResults
from analysis.studies.study_file import CellKey, StudyFile, StudyMethod, UnfinishedCell

__all__ = ["TIMES", "CellKey", "StudyFile", "StudyMethod", "StudyResults", "UnfinishedCell"]
