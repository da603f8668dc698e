"""Studies: ``study.json`` and its cells as tables, with intervals over runs and paired tests."""

from analysis.studies.results import TIMES, StudyResults
from analysis.studies.student_t import mean_interval, paired_test
from analysis.studies.study_file import CellKey, StudyFile, StudyMethod, UnfinishedCell

__all__ = [
    "TIMES",
    "CellKey",
    "StudyFile",
    "StudyMethod",
    "StudyResults",
    "UnfinishedCell",
    "mean_interval",
    "paired_test",
]
