"""Imbalance of spectra beside forgetting, task by task: the table that the paper's claim is about."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.adapters import AdapterSet
from analysis.formats import Record
from analysis.spectra import spectrum_table


def imbalance_table(
    runs: Mapping[str, str | Path], *, metric: str = "entropy_energy_normalized", device: str = "cpu"
) -> pd.DataFrame:
    """Tidy run, task, imbalance, forgetting: one row for every task of every run but a run's last.

    ``imbalance`` = 1 − the mean over layers of `metric` of what the task added, 0 for flat spectra when the
    metric is a normalised entropy; ``forgetting`` = score when the task was just learned less the score at the
    end, in points, so that positive is worse. Updates that are zero do not count.

    Raises:
        ValueError: a run is not complete, or the metric does not exist.
    """
    rows = []
    for label, folder in runs.items():
        record, adapters = Record.load(folder), AdapterSet.load(folder)
        if record.status != "complete" or adapters.tasks != record.tasks:
            raise ValueError(f"{folder} is not complete: forgetting is measured at the end of a run")
        table = spectrum_table(adapters, device, zeros="omit")
        table = table[(table["update"] == "task") & (table["metric"] == metric)]
        if table.empty:
            raise ValueError(f"no metric {metric!r} in the spectra of {folder}")
        means = table.groupby("task")["value"].mean()
        lost = record.matrix.diagonal() - record.matrix[-1]
        rows += [
            (label, task, 1.0 - float(means[task]), float(points))
            for task, points in zip(record.tasks[:-1], lost[:-1], strict=True)
            if task in means.index
        ]
    return pd.DataFrame(rows, columns=["run", "task", "imbalance", "forgetting"])
