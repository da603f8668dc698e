"""Self-contained HTML pages: about runs or sets of adapters, about a merge, about a study."""

from analysis.report.changes import Picture, write_change_report
from analysis.report.findings import Finding, find
from analysis.report.many import many_findings, write_many_report
from analysis.report.merging import MergeTables, merge_findings, write_merge_report
from analysis.report.runs import write_report, write_subjects_report
from analysis.report.study import write_study_report
from analysis.report.subjects import Subject, read_subjects
from analysis.report.training import write_training_report

__all__ = [
    "Finding",
    "MergeTables",
    "Picture",
    "Subject",
    "find",
    "many_findings",
    "merge_findings",
    "read_subjects",
    "write_change_report",
    "write_many_report",
    "write_merge_report",
    "write_report",
    "write_study_report",
    "write_subjects_report",
    "write_training_report",
]
