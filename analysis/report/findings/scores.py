"""Findings about the scores of a run."""

from collections.abc import Iterator

import numpy as np

import analysis.plots as plots
from analysis.formats import Record
from analysis.report.findings.finding import Finding

LOSS = 1.0
"""Points that an earlier task has to lose before the page calls for action. Our choice."""


def score_findings(label: str, record: Record) -> Iterator[Finding]:
    """How many points earlier tasks lost by the last stage of training that was evaluated."""
    known = np.flatnonzero(np.isfinite(record.matrix).any(axis=1))
    if not known.size or (last := int(known[-1])) < 1:
        return
    after = np.diagonal(record.matrix)[:last]
    changes = record.matrix[last, :last] - after
    if not np.isfinite(changes).any():
        return
    worst, mean = int(np.nanargmin(changes)), float(np.nanmean(changes))
    lost, task = float(changes[worst]), record.tasks[worst]
    now = f"{record.matrix[last, worst]:.1f} after “{record.tasks[last]}”, {after[worst]:.1f} when it was learned"
    forgets, average = lost < -LOSS, f"{mean:+.1f} on average"
    lost_words = f"{label}: “{task}” lost {-lost:.1f} points ({now}); earlier tasks changed by {average}."
    kept_words = f"{label}: no earlier task lost more than {LOSS:g} point; they changed by {average}."
    number = f"{lost:+.1f} points".replace("-", "−")
    yield Finding(
        kind="scores",
        level="act" if forgets else "fine",
        headline=(lost_words if forgets else kept_words).replace(" -", " −"),
        number=number,
        interval="none: one run",
        certainty="Measured on the test examples of the run. The spread between seeds is not known from one run.",
        action="Compare methods that protect earlier tasks: `manifold-cl compare`. Over seeds: `manifold-cl study`."
        if forgets
        else "Repeat with other seeds: `manifold-cl study`.",
        subject=label,
        draw=lambda: plots.plot_accuracy_matrix(record.matrix, record.tasks, zero_shot=record.baseline),
        alt=f"Accuracy matrix: the largest change of an earlier task is {number}, of “{task}” ({now}).",
    )
