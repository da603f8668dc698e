"""Alternative texts of figures: what each one shows, with its numbers."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.formats import Record
from analysis.tables.titles import TITLES


def matrix_text(interference: pd.DataFrame, metric: str) -> str:
    """The range of one interference metric over pairs of tasks, and the pairs at its ends."""
    rows = interference[(interference["metric"] == metric) & (interference["layer"] == "total")].dropna(subset="value")
    title = TITLES.get(metric, metric).capitalize()
    if rows.empty:
        return f"{title}: unknown for every pair of tasks."
    low, high = (rows.sort_values("value").iloc[at] for at in (0, -1))
    if len(rows) == 1:
        return f"{title} of {_pair(high)}: {_number(high['value'])}."
    return (
        f"{title} of {len(rows)} pairs of tasks: from {_number(low['value'])} ({_pair(low)}) "
        f"to {_number(high['value'])} ({_pair(high)})."
    )


def entropy_text(spectra: pd.DataFrame, update: str) -> str:
    """The range of the normalised entropy over layers, and the layer at its lower end."""
    rows = spectra[(spectra["metric"] == "entropy_energy_normalized") & (spectra["update"] == update)]
    means = rows.groupby("layer", sort=False)["value"].mean().dropna()
    if update == "accumulated":
        means = rows[rows["task"] == rows["task"].iloc[-1]].set_index("layer")["value"].dropna()
    what = "the updates" if update == "task" else "the sum of all updates"
    return (
        f"Normalised spectral entropy of {what}, blocks by modules: mean {_number(means.mean())}, "
        f"least {_number(means.min())} in {means.idxmin()}, largest {_number(means.max())}."
    )


def spectra_text(values: Mapping[str, pd.DataFrame], update: str) -> str:
    """The ratio of the first to the last singular value per run, median over layers and tasks."""
    parts = []
    for label, table in values.items():
        rows = table[(table["update"] == update) & (table["value"] > 0)]
        groups = rows.groupby(["task", "layer"], sort=False)["value"]
        ratio = (groups.max() / groups.min()).median()
        parts.append(f"{label} {_number(ratio)}")
    what = "the updates" if update == "task" else "the sums of all updates so far"
    return (
        f"Singular values of {what}, one panel per task. Largest over smallest, median over layers: {', '.join(parts)}."
    )


def angles_text(angles: pd.DataFrame) -> str:
    """The smallest and median principal angle between inputs."""
    rows = np.degrees(angles[angles["side"] == "input"]["angle"])
    return (
        "Principal angles between input spaces of pairs of tasks, with the band of random subspaces: "
        f"smallest {rows.min():.0f}°, median {rows.median():.0f}°."
    )


def accuracy_text(record: Record) -> str:
    """The scores of the last stage, and the worst change since a task was learned."""
    known = np.flatnonzero(np.isfinite(record.matrix).any(axis=1))
    if not known.size:
        return "Accuracy matrix without any known score."
    last = int(known[-1])
    scores = ", ".join(
        f"{task} {_number(score)}" for task, score in zip(record.tasks, record.matrix[last], strict=True)
    )
    return f"Accuracy matrix, tasks in columns, stages in rows. After {record.tasks[last]}: {scores}."


def forgetting_text(records: Mapping[str, Record]) -> str:
    """The mean change of earlier tasks per run."""
    parts = [f"{label} {_number(record.merits.get('bwt', np.nan))}" for label, record in records.items()]
    return f"Scores per task after each stage of training. Mean change of earlier tasks by the end: {', '.join(parts)}."


def leakage_text(interference: pd.DataFrame) -> str:
    """The leakage per task."""
    rows = interference[(interference["metric"] == "leakage") & (interference["layer"] == "total")]
    parts = [f"{task} {value:.1e}".replace("-", "−") for task, value in zip(rows["task_b"], rows["value"], strict=True)]
    return f"Share of each update on the subspace protected before it: {', '.join(parts)}."


def capacity_text(record: Record) -> str:
    """The protected share of the inputs after the last task."""
    rows = [row["mean_fraction"] for row in record.capacity if "mean_fraction" in row]
    return f"Share of the input directions protected after each task: {rows[-1]:.1%} after the last one."


def _pair(row: "pd.Series[float]") -> str:
    return f"{row['task_a']} and {row['task_b']}"


def _number(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.3g}".replace("-", "−")
