"""One self-contained HTML page about runs or sets of adapters."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis import plots
from analysis.adapters import AdapterSet
from analysis.interference import interference_table
from analysis.records import Record, label_records
from analysis.spectrum import spectrum_table

PathLike = str | Path
HEADLINES = (
    # key of the metrics, heading, what it says, whether more is better
    ("mft", "MFT", "mean score on each task right after learning it", True),
    ("mfn", "MFN", "mean score on all tasks at the end", True),
    ("maa", "MAA", "mean over the stream of the mean score on tasks learned so far", True),
    ("bwt", "BWT", "mean change of earlier tasks from just learned to the end; negative is forgetting", True),
    ("fwt", "FWT", "mean score on tasks that were not learned yet", True),
    ("zero_shot", "zero-shot", "mean score of the pre-trained model", None),
)

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


def write_report(
    path: PathLike,
    runs: PathLike | Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]],
    *,
    title: str | None = None,
    device: str = "cpu",
) -> Path:
    """The path of a new HTML page that compares and describes `runs`; it needs nothing but itself.

    `runs` are run folders. Adapter folders may stand among them: those of a sequence are taken together, in
    order, as one stream of tasks. A mapping names every run, or list of adapter folders, itself. The page is
    written atomically: it is there completely or not at all.

    Raises:
        FileNotFoundError: a folder or one of its files is missing.
        ValueError: no run is given, or a file is truncated, altered or not supported.
    """
    path = Path(path)
    records, folders = _sort(runs)
    adapters = {label: AdapterSet.load(*group) for label, group in folders.items()}
    labels = list(dict.fromkeys([*records, *adapters]))
    palette = {label: plots.PALETTE[place % len(plots.PALETTE)] for place, label in enumerate(labels)}
    scores = [run.matrix for run in records.values()] + [run.baseline for run in records.values()]
    known = np.concatenate([score[np.isfinite(score)].ravel() for score in scores]) if scores else np.zeros(0)
    limits = (float(known.min()), float(known.max())) if known.size and known.min() < known.max() else None
    environment = Environment(
        loader=PackageLoader("analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, data_uri=plots.to_data_uri)
    page = environment.get_template("report.html.j2").render(
        title=title or _title(records, labels),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headlines=HEADLINES,
        spectrum_columns=SPECTRUM,
        task_columns=PER_TASK,
        records=records,
        best=_best(records),
        palette=palette,
        forgetting=[plots.plot_forgetting(group, palette=palette) for group in _by_tasks(records)],
        spectra=list(_spectra(adapters, device, palette)),
        sections=[_section(label, records.get(label), adapters.get(label), limits, device) for label in labels],
    )
    _write(path, page)
    return path


def _sort(
    runs: PathLike | Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]],
) -> tuple[dict[str, Record], dict[str, list[Path]]]:
    """Label to record, and label to the folders of its adapters; a run without adapters has none."""
    if isinstance(runs, Mapping):
        named = {label: _paths(found) for label, found in runs.items()}
    else:
        paths = _paths(runs)
        found = [path for path in paths if _is_run(path)]
        named = {
            label: [record.folder] for label, record in label_records([Record.load(path) for path in found]).items()
        }
        if others := [path for path in paths if path not in found]:
            named["adapters"] = others
    if not any(named.values()):
        raise ValueError("write_report needs at least one run folder or adapter folder")
    records = {label: Record.load(group[0]) for label, group in named.items() if len(group) == 1 and _is_run(group[0])}
    folders = {
        label: group
        for label, group in named.items()
        if label not in records or any(group[0].glob("tasks/*/adapter.*"))
    }
    return records, folders


def _paths(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _is_run(path: Path) -> bool:
    return (path / "record.json").exists()


def _by_tasks(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs or adapters with the same tasks together: only these share panels."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for label, value in found.items():
        groups.setdefault(value.tasks, {})[label] = value
    return list(groups.values())


def _title(records: Mapping[str, Record], labels: Sequence[str]) -> str:
    streams = dict.fromkeys(record.stream for record in records.values())
    return f"{', '.join(labels)} on {', '.join(streams)}" if streams else ", ".join(labels)


def _best(records: Mapping[str, Record]) -> dict[str, str]:
    """Headline to the label of the run that is best in it, where there is something to compare."""
    best = {}
    for key, _, _, higher in HEADLINES:
        values = {label: run.metrics.get(key, math.nan) for label, run in records.items()}
        values = {label: value for label, value in values.items() if not math.isnan(value)}
        if higher and len(values) > 1:
            best[key] = max(values, key=lambda label: values[label])
    return best


def _spectra(
    adapters: Mapping[str, AdapterSet], device: str, palette: Mapping[str, str]
) -> Iterator[tuple[str, str, Any]]:
    """Kind of update, runs (if not all of them) and figure; one task has no sum of its own."""
    groups = _by_tasks(adapters)
    for group in groups:
        runs = ", ".join(group) if len(groups) > 1 else ""
        several = len(next(iter(group.values())).tasks) > 1
        for update in ("task", "accumulated") if several else ("task",):
            yield update, runs, plots.plot_spectra(group, update=update, device=device, palette=palette)


def _section(
    label: str, record: Record | None, adapters: AdapterSet | None, limits: tuple[float, float] | None, device: str
) -> dict[str, Any]:
    """What the page says about one run or set of adapters."""
    section: dict[str, Any] = {"label": label, "record": record, "adapters": adapters, "figures": {}}
    if record is not None:
        section["figures"]["accuracy"] = plots.plot_accuracy_matrix(
            record.matrix, record.tasks, zero_shot=record.baseline, limits=limits
        )
        section["details"] = {
            "configuration": dict(_flat(record.config)),
            "versions": dict(_flat(record.versions or {})),
            "machine": dict(_flat(record.machine or {})),
            "provenance": dict(_flat(record.provenance or {})),
        }
        section["per_task"] = _per_task(record)
    if adapters is not None:
        spectra, meetings = spectrum_table(adapters, device), interference_table(adapters, device)
        section["spectrum"] = _mean_spectrum(spectra)
        several = len(adapters.tasks) > 1
        updates = ("task", "accumulated") if several else ("task",)
        section["figures"]["entropy"] = plots.plot_entropy_map(spectra, updates=updates)
        if several:
            for metric in ("alignment", "input_overlap", "output_overlap"):
                section["figures"][metric] = plots.plot_interference(meetings, metric=metric)
            total = meetings[meetings["layer"] == "total"]
            section["chance"] = dict(total.groupby("metric")["chance"].mean())
        section["leakage"] = _leakage(meetings)
    return section


def _mean_spectrum(table: pd.DataFrame) -> dict[str, float]:
    """Means over layers and tasks of what each task added."""
    return dict(table[table["update"] == "task"].groupby("metric")["value"].mean())


def _leakage(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Leakage a task: all layers together, the worst layer, and what a random update would leak."""
    rows = []
    for task, group in table[table["metric"] == "leakage"].groupby("task_b", sort=False):
        total, layers = group[group["layer"] == "total"], group[group["layer"] != "total"]
        worst = layers.sort_values("value").iloc[-1]
        row = {"task": task, "total": total["value"].item(), "chance": total["chance"].item()}
        rows.append({**row, "worst": worst["value"], "layer": worst["layer"]})
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


def _number(value: float, form: str = ".1f") -> str:
    """A number for people; a dash when it is unknown, a true minus sign when it is negative."""
    if value is None or math.isnan(value):
        return "–"
    return format(value, form).replace("-", "−") if math.isfinite(value) else "∞"


def _write(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader sees the old page or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's 0o600 would keep the page from a web server
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
