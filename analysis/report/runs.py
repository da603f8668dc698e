"""One self-contained HTML page about runs or sets of adapters."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

import analysis.plots as plots
from analysis.adapters.batches import MEMORY_BUDGET, Progress
from analysis.formats import BOUNDS, Record
from analysis.report import alt_texts, terms
from analysis.report.findings import FIRST, LEVELS, find
from analysis.report.page import HEADLINES, best_labels, write_page
from analysis.report.sections import SHOWN_LEFT_OUT, by_tasks, drift_rows, imbalance, section, spectra_figures
from analysis.report.subjects import PathLike, Runs, Subject, read_subjects
from analysis.report.training import training_section
from analysis.tables.adapter_tables import AdapterTables

SHOWN = ("mft", "mfn", "maa", "bwt", "fwt", "zero_shot")
"""Headlines of a run."""


def write_report(
    path: PathLike,
    runs: Runs,
    *,
    title: str | None = None,
    device: str = "cpu",
    protected: Mapping[str, Tensor] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Path:
    """The path of a new HTML page that compares and describes `runs`; it needs nothing but itself.

    `runs` are run folders. Other paths that `AdapterSet.load` reads may stand among them: those of a sequence are
    taken together, in order, as one stream of tasks. Logs of `TrainingWatch`, in these folders or given themselves,
    have a section each. A mapping names every run, list of adapter folders, or AdapterSet itself. Updates that are
    zero are left out and named. The page is written atomically.

    Adapters are decomposed on `device` within `memory_budget` bytes. `protected` maps layer names to bases for the
    leakage of every task, instead of the subspaces that runs hold. `progress` is called with the number of finished
    layers and of all layers, per run.

    Raises:
        FileNotFoundError: a folder or one of its files is missing.
        ValueError: no run is given, or a file is truncated, altered or not supported.
    """
    measure = partial(AdapterTables, device=device, protected=protected, memory_budget=memory_budget, progress=progress)
    return write_subjects_report(path, read_subjects(runs, measure=measure), title=title)


def write_subjects_report(path: PathLike, subjects: Sequence[Subject], *, title: str | None = None) -> Path:
    """The page of `write_report` about subjects that are read already, with their tables as they are."""
    records = {s.label: s.record for s in subjects if s.record is not None}
    groups = by_tasks(records)
    palette = {s.label: plots.PALETTE[number % len(plots.PALETTE)] for number, s in enumerate(subjects)}
    scores = [run.matrix for run in records.values()] + [run.baseline for run in records.values()]
    known = np.concatenate([score[np.isfinite(score)].ravel() for score in scores]) if scores else np.zeros(0)
    limits = (float(known.min()), float(known.max())) if known.size and known.min() < known.max() else None
    return write_page(
        path,
        "report.html.j2",
        title=title or _title(records, [s.label for s in subjects]),
        headlines=[(key, *HEADLINES[key]) for key in SHOWN],
        findings=[(one, index < FIRST) for index, one in enumerate(find(subjects))],
        levels=LEVELS,
        terms=terms,
        answers={s.label: s.answers for s in subjects if s.answers is not None},
        drift={s.label: drift_rows(s.drift) for s in subjects if s.drift is not None},
        shown_left_out=SHOWN_LEFT_OUT,
        trainings=[(_named(s, name), training_section(log)) for s in subjects for name, log in s.training.items()],
        records=records,
        best=best_labels({label: run.merits for label, run in records.items() if run.method not in BOUNDS}),
        palette=palette,
        forgetting=[
            (plots.forgetting_panels(group, palette=palette), alt_texts.forgetting_text(group)) for group in groups
        ],
        summary=[
            (plots.plot_forgetting(group, palette=palette), alt_texts.forgetting_text(group))
            for group in groups
            if len(records) > 1
        ],
        imbalance=imbalance(subjects),
        spectra=list(spectra_figures({s.label: s.tables for s in subjects if s.tables is not None}, palette)),
        sections=[section(subject, limits) for subject in subjects],
    )


def _named(subject: Subject, name: str) -> str:
    """The name of a training, with its run where it belongs to one."""
    return name if subject.record is None else f"{subject.label}, {name}"


def _title(records: Mapping[str, Record], labels: Sequence[str]) -> str:
    streams = dict.fromkeys(record.stream for record in records.values())
    return f"{', '.join(labels)} on {', '.join(streams)}" if streams else ", ".join(labels)
