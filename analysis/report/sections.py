"""What a report says about each run or set of adapters: figures and rows of tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from analysis import plots
from analysis.adapters.adapter_set import AdapterSet
from analysis.formats import Record
from analysis.plots.style import TITLES
from analysis.report.subjects import Subject
from analysis.statistics.nulls import against_chance
from analysis.tables.components import principal_angles
from analysis.tables.imbalance import imbalance_rows
from analysis.tables.interference import interference_table
from analysis.tables.spectrum_table import left_out

SPECTRUM = (
    ("entropy_energy_normalized", "entropy / ln\u00a0r", ".3f"),
    ("effective_rank_energy", "effective rank (energy)", ".2f"),
    ("effective_rank_roy_vetterli", "effective rank (Roy–Vetterli)", ".2f"),
    ("stable_rank", "stable rank", ".2f"),
    ("top1_energy", "energy in σ₁", ".1%"),
    ("frobenius", "‖ΔW‖ (Frobenius)", ".3g"),
)
PER_TASK = {
    "orthonormality": ("orthonormality error", ".1e"),
    "protection": ("protection error", ".1e"),
    "mean_fraction": ("inputs protected, mean", ".1%"),
    "max_fraction": ("inputs protected, most", ".1%"),
    "prepare": ("prepare (s)", ".1f"),
    "train": ("train (s)", ".1f"),
    "optimizer": ("of it in step()", ".1%"),
    "finish": ("finish (s)", ".1f"),
    "evaluate": ("evaluate (s)", ".1f"),
    "steps": ("steps", ".0f"),
}
MATRICES = ("alignment", "input_overlap", "output_overlap", "backward")


def by_tasks(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs or adapters with the same tasks together: only these share panels."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for label, value in found.items():
        groups.setdefault(value.tasks, {})[label] = value
    return list(groups.values())


def imbalance(subjects: Sequence[Subject], spectra: Mapping[str, pd.DataFrame]) -> Any:
    """Imbalance beside forgetting over all tasks of all complete runs, where there are enough for a figure.

    `spectra` holds the table of `spectrum_table` for every label with adapters.
    """
    tables = [
        imbalance_rows(s.label, s.record, spectra[s.label])
        for s in subjects
        if s.record is not None and s.adapters is not None and s.record.status == "complete"
        if s.adapters.tasks == s.record.tasks and len(s.record.tasks) > 1
    ]
    table = pd.concat(tables, ignore_index=True).dropna() if tables else None
    return plots.plot_imbalance(table) if table is not None and len(table) >= 4 else None


def spectra_figures(
    adapters: Mapping[str, AdapterSet], values: Mapping[str, pd.DataFrame], palette: Mapping[str, str]
) -> Iterator[tuple[str, str, Any]]:
    """Kind of update, runs (if not all of them) and figure; one task has no sum of its own."""
    groups = by_tasks(adapters)
    for group in groups:
        runs = ", ".join(group) if len(groups) > 1 else ""
        several = len(next(iter(group.values())).tasks) > 1
        for update in ("task", "accumulated") if several else ("task",):
            tables = {label: values[label] for label in group}
            yield update, runs, plots.spectra_panels(tables, update=update, palette=palette)


def section(
    subject: Subject,
    limits: tuple[float, float] | None,
    device: str,
    protected: Mapping[str, Tensor] | None,
    budget: Mapping[str, Any],
    spectra: pd.DataFrame | None,
) -> dict[str, Any]:
    """What the page says about one run or set of adapters."""
    record, adapters = subject.record, subject.adapters
    figures: dict[str, Any] = {}
    section: dict[str, Any] = {"label": subject.label, "record": record, "adapters": adapters, "figures": figures}
    if record is not None:
        figures["accuracy"] = plots.plot_accuracy_matrix(
            record.matrix, record.tasks, zero_shot=record.baseline, limits=limits
        )
        if any("mean_fraction" in row for row in record.capacity):
            figures["capacity"] = plots.plot_capacity({subject.label: record})
        section["details"] = {
            "configuration": dict(_flat(record.config)),
            "versions": dict(_flat(record.versions or {})),
            "machine": dict(_flat(record.machine or {})),
            "provenance": dict(_flat(record.provenance or {})),
        }
        section["per_task"] = _per_task(record)
    if adapters is not None and spectra is not None:
        meetings = interference_table(adapters, device, protected=protected, **budget)
        section["spectrum"] = _mean_spectrum(spectra)
        section["layers"] = _by_layer(spectra)
        section["zeros"] = left_out(adapters, spectra)
        if _has_entropy(spectra, "task"):
            figures["entropy"] = plots.plot_entropy_map(spectra)
        if len(adapters.tasks) > 1:
            last = adapters.tasks[-1]
            if _has_entropy(spectra[spectra["task"] == last], "accumulated"):
                figures["accumulated"] = plots.plot_entropy_map(spectra, update="accumulated", task=last)
            for metric in MATRICES:
                figures[metric] = plots.plot_interference(meetings, metric=metric)
            angles = principal_angles(adapters, device, **budget)
            if len(angles):
                figures["angles"] = plots.plot_principal_angles(angles)
            total = meetings[meetings["layer"] == "total"]
            section["chance"] = dict(total.groupby("metric")["chance"].mean())
            section["tests"] = _tests(meetings)
        section["leakage"] = _leakage(meetings)
        if section["leakage"]:
            figures["leakage"] = plots.plot_leakage(meetings)
    return section


def _mean_spectrum(table: pd.DataFrame) -> dict[str, float]:
    """Means over layers and tasks of what each task added; NaN where there is nothing to take a mean of."""
    means = table[table["update"] == "task"].groupby("metric")["value"].mean()
    return dict(means.reindex([key for key, _, _ in SPECTRUM]))


def _has_entropy(table: pd.DataFrame, update: str) -> bool:
    """Whether there is anything to colour: one singular value has no normalised entropy."""
    chosen = table[(table["update"] == update) & (table["metric"] == SPECTRUM[0][0])]
    return bool(chosen["value"].notna().any())


def _by_layer(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a layer: means over tasks of what each task added."""
    chosen = table[table["update"] == "task"]
    grid = chosen.pivot_table(index="layer", columns="metric", values="value", sort=False)
    grid = grid.reindex(columns=[key for key, _, _ in SPECTRUM])  # a pivot drops columns of NaN: entropies of rank 1
    return [
        {"layer": layer, **dict(zip(grid.columns, row, strict=True))}
        for layer, row in zip(grid.index, grid.to_numpy(), strict=True)
    ]


def _tests(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a metric and pair: the total against chance, and how many layers stand out after Holm's correction."""
    tested = against_chance(table)
    rows: list[dict[str, Any]] = []
    for (metric, a, b), group in tested.groupby(["metric", "task_a", "task_b"], sort=False):
        total, layers = group[group["layer"] == "total"], group[group["layer"] != "total"]
        if metric == "leakage" or total.empty:
            continue
        row = {key: float(total[key].item()) for key in ("value", "chance", "z", "p")}
        name = TITLES.get(str(metric), str(metric))
        found = int((layers["p_holm"] < 0.05).sum())
        rows.append({"metric": name, "a": a, "b": b, **row, "found": found, "layers": len(layers)})
    return rows


def _leakage(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Leakage a task: all layers together, the worst layer, and what a random update would leak."""
    rows = []
    for task, group in table[table["metric"] == "leakage"].groupby("task_b", sort=False):
        total, layers = group[group["layer"] == "total"], group[group["layer"] != "total"]
        row = {"task": task, "total": total["value"].item(), "chance": total["chance"].item()}
        known = layers.dropna(subset="value").sort_values("value")  # a zero update leaks no share of anything
        worst, layer = known[["value", "layer"]].iloc[-1] if len(known) else (math.nan, "–")
        rows.append({**row, "worst": worst, "layer": layer})
    return rows


def _per_task(record: Record) -> pd.DataFrame:
    """Constraint errors, capacity and times, a row a task that was finished."""
    parts = {"constraints": record.constraints, "capacity": record.capacity, "timings": record.timings}
    columns: dict[str, list[float]] = {}
    count = max(map(len, parts.values()), default=0)
    for rows in parts.values():
        for key in dict.fromkeys(key for row in rows for key in row):
            columns[key] = [row.get(key, math.nan) for row in rows] + [math.nan] * (count - len(rows))
    return pd.DataFrame(columns, index=list(record.tasks[:count])).dropna(axis="columns", how="all")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested options as dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
