"""One self-contained HTML page about a study."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import analysis.plots as plots
from analysis.report.page import HEADLINES, best_labels, write_page
from analysis.studies import StudyResults

COLUMNS = ("mft", "mfn", "maa", "bwt", "fwt", "fwt_flat", "forgetting")
"""Headlines of a study."""
PAIRED = ("mfn", "bwt", "mft", "fwt", "maa")
SHOWN = 2
"""Number of comparisons in the open table; the others are in one that unfolds."""
Numbers = tuple[int, float, float, float, float]
"""n, mean, standard deviation, low and high."""


def write_study_report(
    path: str | Path,
    study: StudyResults,
    *,
    title: str | None = None,
    level: float = 0.95,
    highlight: Collection[str] = (),
) -> Path:
    """The path of a new HTML page about a study; self-contained and written atomically.

    It holds what was run; means with Student's intervals over cells; paired differences from the reference with p and
    Holm's adjusted p; one figure; mean accuracy matrices; costs; how every method was tuned; and which cells are
    missing. `highlight` names labels for a colour of their own.

    Raises:
        ValueError: no cell is complete, a highlighted label has none, or level is not between 0 and 1.
    """
    if not study.labels:
        raise ValueError(f"no cell of the study {study.name!r} is complete: there is nothing to report yet")
    summary, paired = _summary(study, level), _paired(study, level)
    return write_page(
        path,
        "study.html.j2",
        title=title or f"{study.name}: {len(study.labels)} methods on {study.plan.stream}",
        study=study,
        level=level,
        facts=dict(_facts(study)),
        several_machines=len({repr(run.machine) for run in study.records.values()}) > 1,
        headlines=[(key, *HEADLINES[key]) for key in COLUMNS],
        summary=summary,
        best=best_labels({label: {key: row[1] for key, row in summary[label].items()} for label in study.competing}),
        paired=paired,
        differences=plots.plot_differences(study, level=level, highlight=highlight) if paired else None,
        compared=PAIRED,
        shown=SHOWN,
        headings={figure: HEADLINES[figure][0] for figure in COLUMNS},
        overview=plots.plot_study(study, level=level, highlight=highlight),
        cost=plots.plot_cost(study, level=level, highlight=highlight),
        learning=study.fastest("train_minutes"),
        whole_run=study.fastest("minutes"),
        matrices=list(_matrices(study)),
        cells=_cells(study),
        p_value=_p_value,
        options=_options,
    )


def _facts(study: StudyResults) -> Iterator[tuple[str, Any]]:
    """The plan and environment of the study; differences between cells are listed."""
    plan, records = study.plan, study.records.values()
    yield "stream", plan.stream
    for name, tasks in plan.orders.items():
        yield "tasks, in order" if len(plan.orders) == 1 else f"order “{name}”", " → ".join(tasks)
    yield "seeds", ", ".join(map(str, plan.seeds))
    yield "training", _options(plan.training) if plan.training else "the defaults"
    yield "common to all methods", _options(plan.common)
    yield "reference", plan.reference
    yield "cells", f"{len(study.records)} of {len(plan.cells)} complete"
    yield "run with", _options(plan.resources)
    yield "machine", _distinct(run.machine for run in records)
    yield "versions", _distinct(run.versions for run in records)


def _distinct(result: Iterable[Mapping[str, Any] | None]) -> str:
    return " / ".join(dict.fromkeys(_options(one or {}) for one in result))


def _options(values: Mapping[str, Any]) -> str:
    """Options in one line; those that are not set are left out."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None) or "–"


def _summary(study: StudyResults, level: float) -> dict[str, dict[str, Numbers]]:
    """Label to figure to its numbers."""
    result: dict[str, dict[str, Numbers]] = {label: {} for label in study.labels}
    for label, figure, n, mean, sd, low, high in study.summary(level).itertuples(index=False):
        result[label][figure] = (int(n), mean, sd, low, high)
    return result


def _paired(study: StudyResults, level: float) -> dict[str, dict[str, dict[str, float]]]:
    """Label to figure to its comparison with the reference; empty where the reference has no complete cell."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    if study.reference not in study.labels:
        return result
    known = set(study.figures()["figure"])
    table = study.paired(figures=[figure for figure in PAIRED if figure in known], level=level)
    for row in table.to_dict("records"):
        result.setdefault(str(row["label"]), {})[str(row["figure"])] = {str(key): value for key, value in row.items()}
    return result


def _p_value(p: float) -> str:
    if np.isnan(p):
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _matrices(study: StudyResults) -> Iterator[tuple[str, Any, int]]:
    """Heading, heat map of the mean accuracies, and number of cells; colours mean the same in all of them."""
    means: dict[tuple[str, str], tuple[Any, Any, int]] = {}
    for label, order in product(study.labels, study.plan.orders):
        runs = [run for cell, run in study.records.items() if (cell.label, cell.order) == (label, order)]
        if runs:
            matrix, start = np.mean([r.matrix for r in runs], axis=0), np.mean([r.baseline for r in runs], axis=0)
            means[label, order] = (matrix, start, len(runs))
    limits = plots.color_range(np.concatenate([part.ravel() for *parts, _ in means.values() for part in parts]))
    for (label, order), (matrix, start, count) in means.items():
        heading = label if len(study.plan.orders) == 1 else f"{label}, {order}"
        zero_shot, names = None if np.isnan(start).all() else start, study.plan.orders[order]
        yield heading, plots.plot_accuracy_matrix(matrix, names, zero_shot=zero_shot, limits=limits), count


def _cells(study: StudyResults) -> list[dict[str, Any]]:
    """One row per complete cell: its key, figures and folder."""
    figures: dict[tuple[str, str, int], dict[str, float]] = {}
    for label, _, order, seed, figure, value in study.figures().itertuples(index=False):
        figures.setdefault((label, order, seed), {})[figure] = value
    return [{"cell": cell, "folder": run.folder.name, **figures[cell]} for cell, run in study.records.items()]
