"""Imbalance of spectra and forgetting, task by task."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY_BUDGET
from analysis.formats import Record
from analysis.tables.spectrum_table import spectrum_table

COLUMNS = ["run", "task", "imbalance", "forgetting"]
DIGITS = 9
"""Decimals of points lost: equal losses are equal numbers, whatever scores they are the difference of."""


def imbalance_table(
    runs: Mapping[str, str | Path],
    *,
    metric: str = "entropy_energy_normalized",
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
) -> pd.DataFrame:
    """Tidy run, task, imbalance, forgetting: one row for every task of every run but a run's last.

    ``imbalance`` = 1 − the mean over layers of `metric` of what the task added (zero updates do not count);
    ``forgetting`` = points that the task lost by the end of the run. `memory_budget` is in bytes.

    Raises:
        ValueError: a run is not complete, or the metric does not exist.
    """
    tables = []
    for label, folder in runs.items():
        record, adapters = Record.load(folder), AdapterSet.load(folder)
        if record.status != "complete" or adapters.tasks != record.tasks:
            raise ValueError(f"{folder} is not complete: forgetting is measured at the end of a run")
        spectra = spectrum_table(adapters, device, zeros="omit", memory_budget=memory_budget)
        if metric not in set(spectra["metric"]):
            raise ValueError(f"no metric {metric!r} in the spectra of {folder}")
        tables.append(imbalance_rows(label, record, spectra, metric=metric))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def imbalance_rows(
    label: str, record: Record, spectra: pd.DataFrame, *, metric: str = "entropy_energy_normalized"
) -> pd.DataFrame:
    """The rows of `imbalance_table` for one complete run, from the table that `spectrum_table` made of its adapters."""
    chosen = spectra[(spectra["update"] == "task") & (spectra["metric"] == metric)]
    means = chosen.groupby("task")["value"].mean()
    lost = np.round(record.matrix.diagonal() - record.matrix[-1], DIGITS)
    rows = [
        (label, task, 1.0 - float(means[task]), float(points))
        for task, points in zip(record.tasks[:-1], lost[:-1], strict=True)
        if task in means.index
    ]
    return pd.DataFrame(rows, columns=COLUMNS)
