"""``manifold-cl compare``: runs and studies beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from manifold_cl import RunRecord
from manifold_cl.cli.screen import screen

if TYPE_CHECKING:
    import pandas as pd

    from analysis import Study

FIGURES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")
MEANINGS = (
    "MFT just learned · MFN at the end · MAA average on the way · BWT change of earlier tasks · FWT on tasks not yet "
    "learned"
)
CAPTION = f"{MEANINGS} · constraint: largest |xᵀx − I|, |Fᵀx|"
SHOWN = ("mft", "mfn", "maa", "bwt", "fwt")
COSTS = (("minutes", "minutes"), ("peak_memory_mb", "peak MB"), ("state_mb", "kept MB"))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of studies.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Print the figures of finished or unfinished runs, or of whole studies, beside each other."""
    from analysis import Study

    studies = [folder for folder in runs if (folder / "study.json").exists()]
    if studies and len(studies) < len(runs):
        raise ValueError("folders of runs and of studies do not stand in one table: compare them in two calls")
    if as_json and len(studies) > 1:
        raise ValueError(f"--json prints one study, got {len(studies)}: give one folder")
    for folder in studies:
        print_study(Study.load(folder), as_json=as_json)
    if not studies:
        print_runs([RunRecord.load(folder) for folder in runs], as_json=as_json)


def print_study(study: Study, *, as_json: bool) -> None:
    """Print the means of a study over its seeds and orders, a row a method."""
    summary, paired = study.summary(), study.paired()
    if as_json:
        tables = {"summary": summary, "paired": paired}
        print(json.dumps({name: json.loads(t.to_json(orient="records")) for name, t in tables.items()}, indent=1))
        return
    cells = summary.groupby("label", sort=False)["n"].max()
    table = Table(
        title=f"{study.name}: mean in percent ± half the 95 % interval over seeds and orders of the same tasks",
        title_justify="left",
        caption=f"{MEANINGS} · Δ MFN against {study.reference}, paired; p adjusted after Holm · kept: what a method "
        "carries from task to task",
        caption_justify="left",
    )
    headings = [*(name.upper() for name in SHOWN), "Δ MFN", "p", *(heading for _, heading in COSTS), "old data"]
    table.add_column("method", no_wrap=True)
    for heading in ("n", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    mean = summary.set_index(["label", "figure"])
    against = paired[paired["figure"] == "mfn"].set_index("label")
    for label in cells.index:
        values = mean.loc[label]
        table.add_row(
            str(label),
            str(int(cells[label])),
            *(_with_interval(values.loc[figure]) for figure in SHOWN),
            *(_difference(against.loc[label]) if label in against.index else ("–", "–")),
            *(_number(values, figure) for figure, _ in COSTS),
            {True: "yes", False: "no", None: "–"}[_keeps_data(values)],
        )
    for said in study.missing:
        screen.print(f"[yellow]not complete: {said}[/]", highlight=False, soft_wrap=True)
    Console(width=None if Console().is_terminal else 150).print(table)


def _with_interval(row: pd.Series[Any]) -> str:
    half = (row["high"] - row["low"]) / 2
    return f"{row['mean']:.1f}" + ("" if half != half else f" ±{half:.1f}")


def _difference(row: pd.Series[Any]) -> tuple[str, str]:
    p = row["p_holm"]
    return f"{row['difference']:+.1f}", "–" if p != p else f"{p:.3f}"


def _number(values: pd.DataFrame, figure: str) -> str:
    mean = values["mean"].get(figure, float("nan"))
    return "–" if mean != mean else f"{mean:.1f}"


def _keeps_data(values: pd.DataFrame) -> bool | None:
    kept = values["mean"].get("old_examples", float("nan"))
    return None if kept != kept else bool(kept > 0)


def print_runs(records: Sequence[RunRecord], *, as_json: bool) -> None:
    """Print the figures of runs, a row a run."""
    if as_json:
        content = [
            {
                "name": r.name,
                "method": r.method,
                "stream": r.stream,
                "status": r.status,
                "tasks": r.tasks,
                "metrics": {k: None if v != v else v for k, v in r.metrics.items()},
            }
            for r in records
        ]
        print(json.dumps(content, indent=1))
        return
    streams = {(r.stream, tuple(r.tasks)) for r in records}
    title = f"{records[0].stream}: accuracy in percent" if len(streams) == 1 else "accuracy in percent"
    table = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    for column in ("run", *(name.upper().replace("_", "-") for name in FIGURES), "minutes", "peak MB", "constraint"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column == "run")
    for r in records:
        worst = max((error for errors in r.constraints for error in errors.values()), default=None)
        table.add_row(
            r.name if r.status == "complete" else f"{r.name} ({r.done} of {len(r.tasks)} tasks)",
            *(_points(r.metrics.get(name)) for name in FIGURES),
            f"{r.seconds / 60:.1f}",
            f"{r.peak_memory_mb:.0f}",
            "–" if worst is None else f"{worst:.0e}",
        )
    if len(streams) > 1:
        screen.print("[yellow]these runs learned different streams: their figures do not compare[/]")
    Console(width=None if Console().is_terminal else 130).print(table)


def _points(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1f}"
