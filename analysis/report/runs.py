"""One self-contained HTML page about runs or sets of adapters."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from analysis import plots
from analysis.adapters.batches import MEMORY, Progress
from analysis.formats import BOUNDS, Record
from analysis.report.page import write_page
from analysis.report.sections import PER_TASK, SPECTRUM, by_tasks, imbalance, section, spectra_figures
from analysis.report.subjects import PathLike, Runs, Subject, read_subjects
from analysis.tables.spectrum_table import singular_values, spectrum_table

HEADLINES = (
    # key of the metrics, heading, what it says, whether more is better
    ("mft", "MFT", "mean score on each task right after learning it", True),
    ("mfn", "MFN", "mean score on all tasks at the end", True),
    ("maa", "MAA", "mean over the stream of the mean score on tasks learned so far", True),
    ("bwt", "BWT", "mean change of earlier tasks from just learned to the end; negative is forgetting", True),
    ("fwt", "FWT", "mean score on tasks that were not learned yet", True),
    ("zero_shot", "zero-shot", "mean score of the pre-trained model", None),
)


def write_report(
    path: PathLike,
    runs: Runs | Sequence[Subject],
    *,
    title: str | None = None,
    device: str = "cpu",
    protected: Mapping[str, Tensor] | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Path:
    """The path of a new HTML page that compares and describes `runs`; it needs nothing but itself.

    `runs` are run folders. Other paths that `AdapterSet.load` reads may stand among them: those of a sequence are
    taken together, in order, as one stream of tasks. A mapping names every run, list of adapter folders, or
    AdapterSet itself. Updates that are zero are left out and named. The page is written atomically: it is
    there completely or not at all.

    Args:
        path: where the page goes.
        runs: what it is about.
        title: heading; made of the labels if not given.
        device: where spectra are computed.
        protected: layer name to basis, for the leakage of every task, instead of the subspaces that runs hold.
        memory: budget in bytes of the computations.
        progress: told the layers done and all of them, table by table.

    Raises:
        FileNotFoundError: a folder or one of its files is missing.
        ValueError: no run is given, or a file is truncated, altered or not supported.
    """
    subjects = _subjects(runs)
    records = {s.label: s.record for s in subjects if s.record is not None}
    palette = {s.label: plots.PALETTE[place % len(plots.PALETTE)] for place, s in enumerate(subjects)}
    scores = [run.matrix for run in records.values()] + [run.baseline for run in records.values()]
    known = np.concatenate([score[np.isfinite(score)].ravel() for score in scores]) if scores else np.zeros(0)
    limits = (float(known.min()), float(known.max())) if known.size and known.min() < known.max() else None
    budget: dict[str, Any] = {"memory": memory, "progress": progress}
    adapters = {s.label: s.adapters for s in subjects if s.adapters is not None}
    values = {label: singular_values(updates, device, **budget) for label, updates in adapters.items()}
    spectra = {label: spectrum_table(updates, device, zeros="omit", **budget) for label, updates in adapters.items()}
    return write_page(
        path,
        "report.html.j2",
        title=title or _title(records, [s.label for s in subjects]),
        headlines=HEADLINES,
        spectrum_columns=SPECTRUM,
        task_columns=PER_TASK,
        records=records,
        best=_best(records),
        palette=palette,
        forgetting=[plots.forgetting_panels(group, palette=palette) for group in by_tasks(records)],
        summary=[plots.plot_forgetting(group, palette=palette) for group in by_tasks(records) if len(records) > 1],
        imbalance=imbalance(subjects, spectra),
        spectra=list(spectra_figures(adapters, values, palette)),
        sections=[section(s, limits, device, protected, budget, spectra.get(s.label)) for s in subjects],
    )


def _subjects(runs: Runs | Sequence[Subject]) -> list[Subject]:
    if isinstance(runs, Sequence) and not isinstance(runs, str) and any(isinstance(one, Subject) for one in runs):
        return [one for one in runs if isinstance(one, Subject)]
    return read_subjects(runs)  # type: ignore[arg-type]


def _title(records: Mapping[str, Record], labels: Sequence[str]) -> str:
    streams = dict.fromkeys(record.stream for record in records.values())
    return f"{', '.join(labels)} on {', '.join(streams)}" if streams else ", ".join(labels)


def _best(records: Mapping[str, Record]) -> dict[str, str]:
    """Headline to the label of the run that is best in it, where runs compete; zero-shot and joint are bounds."""
    best = {}
    for key, _, _, higher in HEADLINES:
        values = {label: run.merits.get(key, math.nan) for label, run in records.items() if run.method not in BOUNDS}
        values = {label: value for label, value in values.items() if not math.isnan(value)}
        if higher and len(values) > 1:
            best[key] = max(values, key=lambda label: values[label])
    return best
