"""The findings of a report in plain words: scores, answers on examples, relations, protection, spectra."""

from collections.abc import Iterator, Sequence

from analysis.report.findings.answers import answer_findings
from analysis.report.findings.finding import LEVELS, Finding
from analysis.report.findings.inputs import input_findings
from analysis.report.findings.scores import score_findings
from analysis.report.findings.trainings import training_finding
from analysis.report.findings.weights import unknown_forgetting, weight_findings
from analysis.report.subjects import Subject

KINDS = ("answers", "scores", "inputs", "unknown", "training", "relations", "protection", "spike", "spectrum")
"""The order in which a page shows findings of different kinds: measurements on data come first."""
FIRST = 5
"""Findings of the first screen; the others are folded."""

__all__ = ["FIRST", "LEVELS", "Finding", "find"]


def find(subjects: Sequence[Subject]) -> list[Finding]:
    """All findings, those of the first screen first: the most pressing one of each kind, then others."""
    found = list(_all(subjects))
    urgency = list(LEVELS)
    order = sorted(found, key=lambda one: (KINDS.index(one.kind), urgency.index(one.level)))
    first = {one.kind: one for one in reversed(order)}
    shown = [first[kind] for kind in KINDS if kind in first][:FIRST]
    return shown + [one for one in order if one not in shown]


def _all(subjects: Sequence[Subject]) -> Iterator[Finding]:
    for subject in subjects:
        found: list[Finding] = []
        if subject.answers is not None:
            found += answer_findings(subject.label, subject.answers)
        if subject.record is not None:
            found += score_findings(subject.label, subject.record)
        if subject.tables is not None:
            if not found:
                found.append(unknown_forgetting(subject.label, subject.tables))
            if subject.drift is not None:
                found += input_findings(subject.label, subject.drift, subject.tables.adapters.tasks)
            found += weight_findings(subject.label, subject.tables)
        for name, log in subject.training.items():
            found.append(training_finding(subject.label, name, log))
        yield from found
