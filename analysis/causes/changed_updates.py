"""Effects of changed updates on the tasks learned before and on the new one, without training."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.causes.result_files import replicate, result_files
from analysis.statistics import holm
from analysis.studies import mean_interval, paired_test

FORMAT, SPECTRA = "manifold_cl.changed_updates", "manifold_cl.update_spectra"
OUTCOMES = ("forgetting", "learning", "forgetting_loss", "learning_loss")
SIZES = ("entropy", "between_layers", "frobenius", "spectral", "nuclear")
BEFORE, TRAINED = "before", "trained"


def changed_table(paths: Iterable[str | Path]) -> pd.DataFrame:
    """One row per run, task and change of its update, from the files of ``evaluate_changes`` of manifold_cl.

    Columns: run, method, replicate, task, position (tasks learned before it), change, four outcomes and five measures
    of the changed update's spectrum. ``forgetting`` is the mean loss of score of the earlier tasks by this update, in
    points, and ``learning`` the gain of its own task. ``forgetting_loss`` and ``learning_loss`` are the same in nats:
    the rise and the fall of the loss. Measures: ``entropy``, mean over layers, 1 for flat spectra; ``between_layers``,
    that of the layers' energies, 1 for equal norms; and three norms, means over layers.

    Raises:
        ValueError: a file is damaged or of another format.
    """
    rows = []
    for run, content in result_files(paths, FORMAT, "cells"):
        for task, cells in content["cells"].items():
            before = cells.get(BEFORE)
            for change, cell in cells.items():
                if change == BEFORE or before is None:
                    continue
                score = np.subtract(cell["score"], before["score"])
                loss = np.subtract(cell["loss"], before["loss"])
                outcomes = (-score[:-1].mean(), score[-1], loss[:-1].mean(), -loss[-1])
                spectrum = [cell["spectrum"].get(size, np.nan) for size in SIZES]
                position = content["tasks"].index(task)
                rows.append((run, content["method"], replicate(content), task, position, change, *outcomes, *spectrum))
    columns = ["run", "method", "replicate", "task", "position", "change", *OUTCOMES, *SIZES]
    return pd.DataFrame(rows, columns=columns)


def change_effects(table: pd.DataFrame, *, outcomes: Sequence[str] = OUTCOMES, level: float = 0.95) -> pd.DataFrame:
    """One row per method, change and outcome: its mean, and its difference from the update as trained.

    Columns method, change, outcome, entropy, between_layers, frobenius, n, tasks, mean, low, high, difference,
    difference_low, difference_high, p, p_holm. The unit is the replicate: outcomes are averaged over the tasks of a run
    first, over those tasks that the run has for every change. Intervals are Student's over replicates, NaN for one. p
    is that of the paired t test, and Holm's adjustment is over the changes of one method and outcome.

    Raises:
        ValueError: level is not between 0 and 1, or no task of a method has every change.
    """
    rows, shown = [], ["entropy", "between_layers", "frobenius"]
    for method, group in table.groupby("method", sort=False):
        complete = _complete(group)
        means = complete.groupby(["change", "run"], sort=False)[[*outcomes, *shown]].mean()
        tasks = complete.groupby("run")["task"].nunique()
        for outcome in outcomes:
            grid = means[outcome].unstack("run")
            trained = grid.loc[TRAINED]
            tests = {change: paired_test(grid.loc[change], trained, level=level) for change in grid.index}
            adjusted = holm([test.p if change != TRAINED else np.nan for change, test in tests.items()])
            for (change, test), p_holm in zip(tests.items(), adjusted.tolist(), strict=True):
                size = [float(means.loc[change][each].mean()) for each in shown]
                n, mean, _, low, high = mean_interval(grid.loc[change], level=level)
                difference = (test.difference, test.low, test.high) if change != TRAINED else (0.0, np.nan, np.nan)
                p = test.p if change != TRAINED else np.nan
                ends = (mean, low, high, *difference, p, p_holm)
                rows.append((method, change, outcome, *size, n, int(tasks.sum()), *ends))
    columns = ["method", "change", "outcome", *shown, "n", "tasks", "mean", "low", "high"]
    columns += ["difference", "difference_low", "difference_high", "p", "p_holm"]
    return pd.DataFrame(rows, columns=columns)


def spectra_table(paths: Iterable[str | Path]) -> pd.DataFrame:
    """One row per run and task with the measures of its update: run, method, replicate, task and five measures.

    From the files of ``summarise_updates`` of manifold_cl; the measures are those of `changed_table`.

    Raises:
        ValueError: a file is damaged or of another format.
    """
    rows = [
        (run, content["method"], replicate(content), task, *(summary[size] for size in SIZES))
        for run, content in result_files(paths, SPECTRA, "updates")
        for task, summary in content["updates"].items()
    ]
    return pd.DataFrame(rows, columns=["run", "method", "replicate", "task", *SIZES])


def _complete(group: pd.DataFrame) -> pd.DataFrame:
    """The rows of (run, task) pairs that have every change of their method, and the update as trained."""
    changes = {TRAINED, *group["change"]}
    counts = group.groupby(["run", "task"])["change"].transform("nunique")
    complete = group[counts == len(changes)]
    if complete.empty:
        run, task = group[["run", "task"]].iloc[0]
        own = set(group[(group["run"] == run) & (group["task"] == task)]["change"])
        raise ValueError(
            f"no task of {group['method'].iloc[0]} has every change: {task} of {run} lacks "
            f"{', '.join(sorted(changes - own))}: evaluate the same changes for all runs, or leave files out"
        )
    return complete
