"""A study: methods × seeds × orders of the tasks, read as tables with intervals and paired tests."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.formats import BOUNDS, Record
from analysis.statistics.nulls import holm
from analysis.studies.student_t import mean_interval, paired_test
from analysis.studies.study_file import CellKey, StudyFile, StudyMethod, UnfinishedCell, read_cells, read_study_file

SCORES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt", "fwt_flat", "forgetting", "forgetting_just_learned")
"""Figures of merit that a record carries, in points."""
TIMES = ("minutes", "train_minutes")
COSTS = (*TIMES, "peak_memory_mb", "updates_mb", "state_mb", "old_examples")
PAIRED = ("mft", "mfn", "maa", "bwt", "fwt")
SHARED = (
    " Cells of one order share that order's effect and count as independent here: over further orders the mean may "
    "vary more than the interval says."
)
"""What else an interval needs said of it where the order of the tasks varies."""
MB = 1e6
"""Bytes."""


@dataclass(frozen=True, eq=False)
class StudyResults:
    """The complete cells of a study, by label, order and seed, and the others by how far they came.

    A label is the name of a method with its options. Two labels may share a method.
    """

    plan: StudyFile
    records: Mapping[CellKey, Record]
    missing: tuple[UnfinishedCell, ...]

    @classmethod
    def load(cls, path: str | Path) -> "StudyResults":
        """The study in a folder, or that of the ``study.json`` named directly.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it or a record is truncated, of another format or version, or one contradicts the other.
        """
        plan = read_study_file(path)
        records, missing = read_cells(plan)
        return cls(plan, records, tuple(missing))

    @property
    def name(self) -> str:
        """The study's name."""
        return self.plan.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels with at least one complete cell, in the order of ``study.json``."""
        found = {cell.label for cell in self.records}
        return tuple(label for label in self.plan.methods if label in found)

    @property
    def reference(self) -> str:
        """Label of the method that the others are compared with."""
        return self.plan.reference

    @property
    def methods(self) -> Mapping[str, StudyMethod]:
        """Label to method, options and search."""
        return self.plan.methods

    @property
    def competing(self) -> tuple[str, ...]:
        """Labels that compete: they learn task by task and are not known to keep old training examples."""
        return tuple(
            label
            for label in self.labels
            if self.methods[label].method not in BOUNDS and not self.keeps_old_data(label)
        )

    def keeps_old_data(self, label: str) -> bool | None:
        """Whether a method needs training examples of other tasks at hand; None where no record says."""
        runs = [run for cell, run in self.records.items() if cell.label == label]
        counts = [run.stored["old_examples"] for run in runs if run.stored and "old_examples" in run.stored]
        return any(count > 0 for count in counts) if counts else None

    def note(self, level: float = 0.95) -> str:
        """What an interval of this study means, in a sentence for whoever shows one."""
        if max(Counter(cell.label for cell in self.records).values(), default=0) < 2:
            return "No method has two complete cells: there are no intervals, and the spread between seeds is unknown."
        return (
            f"Intervals: {100 * level:g} %, Student's t, over {self.replicates}. Tasks and test texts are the same in "
            "every cell, so an interval says where the mean over more such cells lies, and nothing about other tasks."
            f"{SHARED if self._orders > 1 else ''}"
        )

    @property
    def replicates(self) -> str:
        """What complete cells of a method differ in: ``3 seeds``, or ``3 seeds and 2 orders of the tasks``."""
        seeds = len({cell.seed for cell in self.records})
        said = f"{seeds} seed{'s' if seeds != 1 else ''}"
        return said if self._orders < 2 else f"{said} and {self._orders} orders of the tasks"

    @property
    def _orders(self) -> int:
        """How many orders of the tasks complete cells have."""
        return len({cell.order for cell in self.records})

    def figures(self) -> pd.DataFrame:
        """A row a complete cell and figure: label, method, order, seed, figure, value.

        Scores in percent or points, by `SCORES`, as far as a record has them; forward transfer not of joint training,
        which has seen every task at once. ``minutes`` is the time of preparing,
        training, finishing and evaluating all tasks, ``train_minutes`` the same without evaluating.
        ``peak_memory_mb`` is the process's, ``updates_mb`` what all tasks' updates take on disk, ``state_mb`` what is
        carried from task to task, both in 10⁶ bytes; ``old_examples`` counts the training examples of other tasks
        that have to be at hand. Unknown costs are NaN.
        """
        rows = [
            (cell.label, run.method, cell.order, cell.seed, figure, value)
            for cell, run in self.records.items()
            for figure, value in _figures(run)
        ]
        return pd.DataFrame(rows, columns=["label", "method", "order", "seed", "figure", "value"])

    def accuracy(self) -> pd.DataFrame:
        """A row a complete cell, score, stage and task.

        Columns label, method, order, seed, after, task, position, score, value. ``after`` counts the tasks learned, 0
        is the pre-trained model; ``position`` is the task's place in the order, from 1. A task with
        ``position > after`` is unseen. Values are in percent, NaN where nothing was evaluated.
        """
        rows = [
            (cell.label, run.method, cell.order, cell.seed, after, task, place, score, float(value))
            for cell, run in self.records.items()
            for score, matrix in run.accuracy.items()
            for after, row in enumerate(np.vstack([run.zero_shot.get(score, np.full(len(run.tasks), np.nan)), matrix]))
            for place, (task, value) in enumerate(zip(run.tasks, row, strict=True), start=1)
        ]
        columns = ["label", "method", "order", "seed", "after", "task", "position", "score", "value"]
        return pd.DataFrame(rows, columns=columns)

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """A row a label and figure: n, mean, sd, low, high; `note` says what the interval means.

        The interval is Student's over cells, NaN with fewer than two; n counts the known values. It takes cells for
        independent, which those of one order are not where there are several orders.

        Raises:
            ValueError: level is not between 0 and 1.
        """
        rows = [
            (label, figure, *mean_interval(values, level=level))
            for (label, figure), values in self.figures().groupby(["label", "figure"], sort=False)["value"]
        ]
        return pd.DataFrame(rows, columns=["label", "figure", "n", "mean", "sd", "low", "high"])

    def fastest(self, figure: str = "minutes") -> dict[str, float]:
        """Label to the least of a time over its cells, NaN if unknown: other work on a machine only ever adds to it.

        Raises:
            ValueError: the figure is not a time.
        """
        if figure not in TIMES:
            raise ValueError(f"{figure!r} is not a time; the times are {', '.join(TIMES)}")
        table = self.figures()
        least = table[table["figure"] == figure].groupby("label")["value"].min()
        return {label: float(least[label]) for label in self.labels}

    def paired(
        self, reference: str | None = None, figures: Sequence[str] = PAIRED, level: float = 0.95
    ) -> pd.DataFrame:
        """A row a label and figure, less the reference in the cells of the same order and seed.

        Columns n, difference, low, high, t, p, p_holm: mean difference with Student's interval, the paired t test,
        and its p adjusted by Holm over `competing` without the reference, within a figure. NaN with fewer than two
        pairs; p_holm also for labels that are bounds, which no claim is made about. The test asks whether the *mean
        over cells* differs on these tasks; with few seeds only large differences are found. It takes pairs for
        independent, which those of one order are not where there are several orders.

        Raises:
            ValueError: no complete cell has the reference or a figure, or level is not between 0 and 1.
        """
        reference = reference or self.reference
        if reference not in self.labels:
            raise ValueError(
                f"reference {reference!r} has no complete cell; there are {', '.join(self.labels) or 'none'}"
            )
        table = self.figures()
        known = list(dict.fromkeys(table["figure"]))
        if unknown := [figure for figure in figures if figure not in known]:
            raise ValueError(f"no record has the figure {unknown[0]!r}; the figures are {', '.join(known)}")
        grid = table.set_index(["figure", "order", "seed", "label"])["value"].unstack("label")
        others = [label for label in self.labels if label != reference]
        rows = []
        for figure in figures:
            part = grid.loc[figure]
            tests = [paired_test(part[label], part[reference], level=level) for label in others]
            adjusted = holm(
                [test.p if label in self.competing else np.nan for label, test in zip(others, tests, strict=True)]
            )
            rows += [(label, figure, *test, p) for label, test, p in zip(others, tests, adjusted.tolist(), strict=True)]
        return pd.DataFrame(rows, columns=["label", "figure", "n", "difference", "low", "high", "t", "p", "p_holm"])


def _figures(run: Record) -> Iterator[tuple[str, float]]:
    merits = run.merits
    yield from ((score, merits[score]) for score in SCORES if score in merits)
    yield from zip(COSTS, _costs(run), strict=True)


def _costs(run: Record) -> tuple[float, ...]:
    stored = run.stored or {}
    learning = run.learning_time
    return (
        (learning + run.seconds("evaluate")) / 60,
        learning / 60,
        run.peak_memory_mb,
        stored.get("updates", np.nan) / MB,
        stored.get("state", np.nan) / MB,
        stored.get("old_examples", np.nan),
    )
