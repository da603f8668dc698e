"""Self-contained HTML pages: one about runs or sets of adapters, one about a study."""

from analysis.report.runs import write_report, write_subjects_report
from analysis.report.study import write_study_report
from analysis.report.subjects import Subject, read_subjects

__all__ = ["Subject", "read_subjects", "write_report", "write_study_report", "write_subjects_report"]
