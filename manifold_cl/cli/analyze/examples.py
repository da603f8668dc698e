"""Subjects of a report with what their updates do on examples: changed answers, and drift per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from manifold_cl.cli.analysis_package import analysis

Given = tuple["nn.Module", Mapping[str, Sequence[Any]]]


def measured(
    subjects: Sequence[analysis.report.Subject], given: Given | None, progress: Callable[[int, int], None]
) -> list[analysis.report.Subject]:
    """The subjects, those with adapters measured on the model and batches; as they are where None is given."""
    from manifold_cl.cli.analysis_package import analysis

    if given is None:
        return list(subjects)
    model, data = given
    result = []
    for subject in subjects:
        if subject.adapters is not None:
            answers = analysis.answer_changes(model, subject.adapters, data, progress=progress)
            moments = {
                name: analysis.activations.input_moments(model, subject.adapters, batches)
                for name, batches in data.items()
            }
            drift = analysis.input_drift(subject.adapters, moments)
            subject = replace(subject, answers=analysis.answer_intervals(answers), drift=drift)
        result.append(subject)
    return result
