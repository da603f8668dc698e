"""Results of a study: methods × seeds × orders of the tasks as tables with intervals and paired tests."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.formats import BOUNDS, Record
from analysis.statistics import holm
from analysis.studies.student_t import PairedTest, mean_interval, paired_test
from analysis.studies.study_file import CellKey, StudyFile, StudyMethod, UnfinishedCell

_OF_MATRIX = ("mft", "mfn", "maa", "bwt", "bwt_over_all", "fwt", "fwt_flat", "forgetting", "forgetting_just_learned")
SCORES = ("zero_shot", *_OF_MATRIX)
"""Figures of merit of a record, in points."""
TIMES = ("minutes", "train_minutes")
COSTS = (*TIMES, "peak_memory_mb", "updates_mb", "state_mb", "old_examples")
PAIRED = ("mft", "mfn", "maa", "bwt", "fwt")
SHARED = (
    " Cells of one order share that order's effect and count as independent here: over further orders the mean may "
    "vary more than the interval says."
)
"""Sentence beside an interval if the order of the tasks varies."""
MB = 1e6
"""Bytes."""


@dataclass(frozen=True, eq=False)
class StudyResults:
    """The complete cells of a study, by label, order and seed, and the progress of the others.

    A label is the name of a method with its options. Two labels may share a method.
    """

    plan: StudyFile
    records: Mapping[CellKey, Record]
    missing: tuple[UnfinishedCell, ...]

    @classmethod
    def load(cls, path: str | Path) -> "StudyResults":
        """The study in a folder, or that of a ``study.json``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it or a record is truncated, of another format or version, or one contradicts the other.
        """
        plan = StudyFile.load(path)
        records, missing = plan.read_cells()
        return cls(plan, records, tuple(missing))

    @property
    def name(self) -> str:
        """The study's name."""
        return self.plan.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels with at least one complete cell, in the order of ``study.json``."""
        complete = {cell.label for cell in self.records}
        return tuple(label for label in self.plan.methods if label in complete)

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
        sequential = [label for label in self.labels if self.methods[label].method not in BOUNDS]
        return tuple(label for label in sequential if not self.keeps_old_data(label))

    def keeps_old_data(self, label: str) -> bool | None:
        """Whether a method needs training examples of other tasks; None if no record has the number."""
        runs = [run for cell, run in self.records.items() if cell.label == label]
        counts = [run.stored["old_examples"] for run in runs if run.stored and "old_examples" in run.stored]
        return any(count > 0 for count in counts) if counts else None

    def note(self, level: float = 0.95) -> str:
        """The meaning of an interval of this study, in a sentence."""
        if max(Counter(cell.label for cell in self.records).values(), default=0) < 2:
            return "No method has two complete cells: there are no intervals, and the spread between seeds is unknown."
        return (
            f"Intervals: {100 * level:g} %, Student's t, over {self.replicates}. Tasks and test texts are the same in "
            "every cell, so an interval says where the mean over more such cells lies, and nothing about other tasks."
            f"{SHARED if self._shares_orders else ''}"
        )

    @property
    def replicates(self) -> str:
        """Number of seeds and orders of the complete cells, in words such as ``3 seeds and 2 orders of the tasks``."""
        if self._orders > 1 and not self._shares_orders:
            return f"{self._orders} orders of the tasks, each with a seed of its own"
        count = len({cell.seed for cell in self.records})
        seeds = f"{count} seed{'s' if count != 1 else ''}"
        return seeds if self._orders < 2 else f"{seeds} and {self._orders} orders of the tasks"

    @property
    def _shares_orders(self) -> bool:
        """Whether several seeds ran with one order, whose effect they share."""
        return self._orders > 1 and len({(cell.order, cell.seed) for cell in self.records}) > self._orders

    @property
    def _orders(self) -> int:
        return len({cell.order for cell in self.records})

    def figures(self) -> pd.DataFrame:
        """One row per complete cell and figure: label, method, order, seed, figure, value.

        Scores are in percent or points, by `SCORES`, as far as a record has them. Joint training has no forward
        transfer. ``minutes`` is the time of preparing, training, finishing and evaluating all tasks, ``train_minutes``
        the same without evaluation. ``peak_memory_mb`` is the process's. ``updates_mb`` is the size of all updates on
        disk, ``state_mb`` that of the state carried between tasks, both in 10⁶ bytes. ``old_examples`` counts the
        training examples of other tasks that are needed. Unknown costs are NaN.
        """
        rows = [
            (cell.label, run.method, cell.order, cell.seed, figure, value)
            for cell, run in self.records.items()
            for figure, value in _figures(run)
        ]
        return pd.DataFrame(rows, columns=["label", "method", "order", "seed", "figure", "value"])

    def accuracy(self) -> pd.DataFrame:
        """One row per complete cell, score, stage and task.

        Columns label, method, order, seed, after, task, position, score, value. ``after`` counts the tasks learned; 0
        is the pre-trained model. ``position`` is the task's place in the order, from 1: a task with
        ``position > after`` is unseen. Values are in percent, NaN if not evaluated.
        """
        rows = [
            (cell.label, run.method, cell.order, cell.seed, after, task, position, score, float(value))
            for cell, run in self.records.items()
            for score, matrix in run.accuracy.items()
            for after, row in enumerate(np.vstack([run.zero_shot.get(score, np.full(len(run.tasks), np.nan)), matrix]))
            for position, (task, value) in enumerate(zip(run.tasks, row, strict=True), start=1)
        ]
        columns = ["label", "method", "order", "seed", "after", "task", "position", "score", "value"]
        return pd.DataFrame(rows, columns=columns)

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One row per label and figure: n, mean, sd, low, high; `note` explains the interval.

        The interval is Student's over cells, NaN with fewer than two; n counts the known values. Cells count as
        independent, though those of one order are not if there are several orders.

        Raises:
            ValueError: level is not between 0 and 1.
        """
        rows = [
            (label, figure, *mean_interval(values, level=level))
            for (label, figure), values in self.figures().groupby(["label", "figure"], sort=False)["value"]
        ]
        return pd.DataFrame(rows, columns=["label", "figure", "n", "mean", "sd", "low", "high"])

    def fastest(self, figure: str = "minutes") -> dict[str, float]:
        """Label to the least time of its cells, NaN if unknown: other work on a machine only adds to a time.

        Raises:
            ValueError: the figure is not a time.
        """
        if figure not in TIMES:
            raise ValueError(f"{figure!r} is not a time; the times are {', '.join(TIMES)}")
        table = self.figures()
        least = table[table["figure"] == figure].groupby("label")["value"].min()
        return {label: float(least[label]) for label in self.labels}

    def paired(
        self, reference: str | None = None, figures: Sequence[str] | None = None, level: float = 0.95
    ) -> pd.DataFrame:
        """One row per label and figure: the difference from the reference in the cells of the same order and seed.

        By default figures are MFT, MFN, MAA, BWT and FWT, as far as a record has them: joint training has no FWT.
        Columns n, difference, low, high, t, p, p_flip, p_holm, p_flip_holm: mean difference with Student's interval,
        the paired t test and the sign-flip test of `paired_test`, and both adjusted by Holm over `competing` without
        the reference, within a figure. NaN with fewer than two pairs; adjusted ones also for reference methods such as
        joint training. The test is about the *mean over cells* on
        these tasks; with few seeds it finds only large differences. Pairs count as independent, though those of one
        order are not if there are several orders.

        Raises:
            ValueError: no complete cell has the reference or a figure, or level is not between 0 and 1.
        """
        reference = reference or self.reference
        if reference not in self.labels:
            known = ", ".join(self.labels) or "none"
            raise ValueError(f"reference {reference!r} has no complete cell; there are {known}")
        table = self.figures()
        available = list(dict.fromkeys(table["figure"]))
        figures = [figure for figure in PAIRED if figure in available] if figures is None else figures
        if unknown := [figure for figure in figures if figure not in available]:
            raise ValueError(f"no record has the figure {unknown[0]!r}; the figures are {', '.join(available)}")
        grid = table.set_index(["figure", "order", "seed", "label"])["value"].unstack("label")
        others = [label for label in self.labels if label != reference]
        rows = []
        for figure in figures:
            part = grid.loc[figure]
            tests = [paired_test(part[label], part[reference], level=level) for label in others]
            named = list(zip(others, tests, strict=True))
            adjusted = [
                holm(
                    [p if label in self.competing else np.nan for (label, _), p in zip(named, ps, strict=True)]
                ).tolist()
                for ps in zip(*((test.p, test.p_flip) for test in tests), strict=True)
            ]
            rows += [(label, figure, *test, *ps) for (label, test), *ps in zip(named, *adjusted, strict=False)]
        return pd.DataFrame(rows, columns=["label", "figure", *PairedTest._fields, "p_holm", "p_flip_holm"])


def _figures(run: Record) -> Iterator[tuple[str, float]]:
    merits, stored = run.merits, run.stored or {}
    yield from ((score, merits[score]) for score in SCORES if score in merits)
    yield "minutes", (run.learning_time + run.seconds("evaluate")) / 60
    yield "train_minutes", run.learning_time / 60
    yield "peak_memory_mb", run.peak_memory_mb
    yield "updates_mb", stored.get("updates", np.nan) / MB
    yield "state_mb", stored.get("state", np.nan) / MB
    yield "old_examples", stored.get("old_examples", np.nan)
