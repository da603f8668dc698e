"""Sections of a report: figures and rows of tables of each run or set of adapters."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

import analysis.plots as plots
from analysis.formats import Record
from analysis.report import alt_texts
from analysis.report.subjects import Subject
from analysis.report.terms import SPECTRUM
from analysis.tables.adapter_tables import AdapterTables
from analysis.tables.imbalance import imbalance_rows
from analysis.tables.titles import TITLES

SHOWN_DRIFT = 25
"""Layers per update and data set in the table of drift; the table on disk has all."""
SHOWN_LEFT_OUT = 200
"""Rows of the table of what is left out; the table on disk has all."""
MATRICES = ("alignment", "input_overlap", "output_overlap", "backward")


def by_tasks(records: Mapping[str, Record]) -> list[dict[str, Record]]:
    """Groups of runs with the same tasks: only these share panels."""
    groups: dict[tuple[str, ...], dict[str, Record]] = {}
    for label, record in records.items():
        groups.setdefault(record.tasks, {})[label] = record
    return list(groups.values())


def imbalance(subjects: Sequence[Subject]) -> Any:
    """Imbalance and forgetting over all tasks of all complete runs, where there are at least two points."""
    tables = [
        imbalance_rows(s.label, s.record, s.tables.spectra)
        for s in subjects
        if s.record is not None and s.tables is not None and s.record.status == "complete"
        if s.tables.adapters.tasks == s.record.tasks and len(s.record.tasks) > 1
    ]
    table = pd.concat(tables, ignore_index=True).dropna() if tables else None
    if table is None or len(table) < 2:
        return None
    worst = table.sort_values("forgetting").iloc[-1]
    text = (
        f"Imbalance against forgetting, {len(table)} tasks of {table['run'].nunique()} runs. Most forgotten: "
        f"{worst['task']}, {worst['forgetting']:.1f} points at an imbalance of {worst['imbalance']:.2f}."
    )
    return plots.plot_imbalance(table), text.replace("-", "−")


def spectra_figures(
    tables: Mapping[str, AdapterTables], palette: Mapping[str, str]
) -> Iterator[tuple[str, str, tuple[Any, str]]]:
    """Kind of update, runs (if not all of them), and figure with its text; one task has no sum of its own."""
    groups: dict[tuple[str, ...], dict[str, pd.DataFrame]] = {}
    for label, one in tables.items():
        groups.setdefault(one.adapters.tasks, {})[label] = one.singular_values
    for tasks, group in groups.items():
        runs = ", ".join(group) if len(groups) > 1 else ""
        for update in ("task", "accumulated") if len(tasks) > 1 else ("task",):
            drawing = plots.spectra_panels(group, update=update, palette=palette)
            yield update, runs, (drawing, alt_texts.spectra_text(group, update))


def section(subject: Subject, limits: tuple[float, float] | None) -> dict[str, Any]:
    """The section about one run or set of adapters."""
    record = subject.record
    figures: dict[str, Any] = {}
    section: dict[str, Any] = {"label": subject.label, "record": record, "adapters": subject.adapters}
    section["notices"] = subject.notices
    section["figures"] = figures
    if record is not None:
        drawing = plots.plot_accuracy_matrix(record.matrix, record.tasks, zero_shot=record.baseline, limits=limits)
        figures["accuracy"] = (drawing, alt_texts.accuracy_text(record))
        if any("mean_fraction" in row for row in record.capacity):
            figures["capacity"] = (plots.plot_capacity({subject.label: record}), alt_texts.capacity_text(record))
        parts = {"configuration": record.config, "versions": record.versions, "machine": record.machine}
        parts["provenance"] = record.provenance
        section["details"] = {name: dict(_flat(values or {})) for name, values in parts.items()}
        section["per_task"] = _per_task(record)
    if subject.tables is not None:
        section |= _adapters_section(subject.tables, figures)
    return section


def _adapters_section(tables: AdapterTables, figures: dict[str, Any]) -> dict[str, Any]:
    """The part of a section about a set of adapters; adds its figures to `figures`."""
    spectra, interference = tables.spectra, tables.interference
    section: dict[str, Any] = {
        "spectrum": _mean_spectrum(spectra),
        "layers": _by_layer(spectra),
        "zeros": tables.zeros,
        "left_out": tables.adapters.left_out,
        "leakage": _leakage(interference),
    }
    if _has_entropy(spectra, "task"):
        figures["entropy"] = (plots.plot_entropy_map(spectra), alt_texts.entropy_text(spectra, "task"))
    if len(tables.adapters.tasks) > 1:
        last = tables.adapters.tasks[-1]
        if _has_entropy(spectra[spectra["task"] == last], "accumulated"):
            drawing = plots.plot_entropy_map(spectra, update="accumulated", task=last)
            figures["accumulated"] = (drawing, alt_texts.entropy_text(spectra, "accumulated"))
        for metric in MATRICES:
            drawing = plots.plot_interference(interference, metric=metric)
            figures[metric] = (drawing, alt_texts.matrix_text(interference, metric))
        if len(angles := tables.principal_angles):
            figures["angles"] = (plots.plot_principal_angles(angles), alt_texts.angles_text(angles))
        total = interference[interference["layer"] == "total"]
        section["chance"] = dict(total.groupby("metric")["chance"].mean())
        section["tests"] = _tests(tables.against_chance)
    if section["leakage"]:
        figures["leakage"] = (plots.plot_leakage(interference), alt_texts.leakage_text(interference))
    return section


def _mean_spectrum(table: pd.DataFrame) -> dict[str, float]:
    """Means over layers and tasks of what each task added; NaN where there is nothing to take a mean of."""
    means = table[table["update"] == "task"].groupby("metric")["value"].mean()
    return dict(means.reindex(list(SPECTRUM)))


def _has_entropy(table: pd.DataFrame, update: str) -> bool:
    """Whether there is anything to colour: one singular value has no normalised entropy."""
    chosen = table[(table["update"] == update) & (table["metric"] == "entropy_energy_normalized")]
    return bool(chosen["value"].notna().any())


def _by_layer(table: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """One row per layer: means over tasks of what each task added."""
    chosen = table[table["update"] == "task"]
    grid = chosen.pivot_table(index="layer", columns="metric", values="value", sort=False)
    grid = grid.reindex(columns=list(SPECTRUM))  # a pivot drops columns of NaN: entropies of rank 1
    return grid.reset_index().to_dict("records")


def _tests(tested: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per metric and pair: the total against chance, and the number of layers below 0.05 after Holm."""
    rows: list[dict[str, Any]] = []
    for (metric, a, b), group in tested.groupby(["metric", "task_a", "task_b"], sort=False):
        total, layers = group[group["layer"] == "total"], group[group["layer"] != "total"]
        if metric == "leakage" or total.empty:
            continue
        row = {key: float(total[key].item()) for key in ("value", "chance", "z", "p")}
        name, below = TITLES.get(str(metric), str(metric)), int((layers["p_holm"] < 0.05).sum())
        rows.append({"metric": name, "a": a, "b": b, **row, "below": below, "layers": len(layers)})
    return rows


def _leakage(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Leakage per task: all layers together, the worst layer, and what a random update would leak."""
    rows = []
    for task, group in table[table["metric"] == "leakage"].groupby("task_b", sort=False):
        total, layers = group[group["layer"] == "total"], group[group["layer"] != "total"]
        row = {"task": task, "total": total["value"].item(), "chance": total["chance"].item()}
        known = layers.dropna(subset="value").sort_values("value")  # a zero update leaks no share of anything
        worst, layer = known[["value", "layer"]].iloc[-1] if len(known) else (math.nan, "–")
        rows.append({**row, "worst": worst, "layer": layer})
    return rows


def drift_rows(drift: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """The rows of a table of `input_drift`, all layers together first, then the largest of each update."""
    order = drift.assign(first=drift["layer"] != "total")
    order = order.sort_values(["data", "task", "first", "value"], ascending=[True, True, True, False], kind="stable")
    return order.groupby(["data", "task"], sort=False).head(SHOWN_DRIFT).to_dict("records")


def _per_task(record: Record) -> pd.DataFrame:
    """Constraint residuals, capacity and times, one row per finished task."""
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
