"""``manifold-cl compare``: runs and studies beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from manifold_cl import RunRecord
from manifold_cl.cli.screen import screen

if TYPE_CHECKING:
    import pandas as pd

    from analysis import Study

FIGURES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")
CAPTION = (
    "MFT just learned · MFN at the end · MAA average on the way · BWT change of earlier tasks · FWT on tasks not yet "
    "learned · constraint: largest |xᵀx − I|, |Fᵀx|"
)
SHOWN = ("mft", "mfn", "bwt", "fwt")
COSTS = (("peak_memory_mb", "peak MB", 0), ("state_mb", "kept MB", 1))
HEADINGS = (
    "method",
    "n",
    *(name.upper() for name in SHOWN),
    "Δ MFN",
    "p",
    "minutes",
    *(heading for _, heading, _ in COSTS),
    "old data",
)
SCORED = HEADINGS.index("Δ MFN")
"""So many columns go into the first of two tables where one is too wide."""
WIDE = 150
"""Columns of a table that goes into a file or pipe."""
KEY = (
    "n cells · MFT just learned · MFN at the end · BWT change of earlier tasks · FWT on tasks not yet learned · Δ MFN "
    "against {reference}, paired, and its p adjusted after Holm over the methods that compete · minutes: the fastest "
    "cell · kept: what a method carries from task to task"
)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of studies.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a study as a table in Markdown.")] = False,
) -> None:
    """Print the figures of finished or unfinished runs, or of whole studies, beside each other."""
    from analysis import Study

    if as_json and markdown:
        raise ValueError("--json and --markdown exclude each other")
    studies = [folder for folder in runs if (folder / "study.json").exists()]
    if studies and len(studies) < len(runs):
        raise ValueError("folders of runs and of studies do not stand in one table: compare them in two calls")
    if as_json and len(studies) > 1:
        raise ValueError(f"--json prints one study, got {len(studies)}: give one folder")
    if markdown and not studies:
        raise ValueError("--markdown prints studies, and none of these folders holds a study.json")
    for folder in studies:
        study = Study.load(folder)
        _say_missing(study)
        if markdown:
            print(markdown_of(study))
        else:
            print_study(study, as_json=as_json)
    if not studies:
        print_runs([RunRecord.load(folder) for folder in runs], as_json=as_json)


def print_study(study: Study, *, as_json: bool) -> None:
    """Print the means of a study over its seeds and orders, a row a method."""
    if as_json:
        content = {"summary": _rows_of(study.summary()), "paired": []}
        if study.reference in study.labels:
            content["paired"] = _rows_of(study.paired())
        print(json.dumps(content, indent=1))
        return
    console = Console(width=None if Console().is_terminal else WIDE)
    rows = list(_rows(study))
    whole = _table(rows, range(len(HEADINGS)))
    parts = [whole]
    if console.measure(whole, options=console.options.update(width=1000)).maximum > console.width:
        parts = [_table(rows, range(SCORED)), _table(rows, (0, *range(SCORED, len(HEADINGS))))]
    console.print(f"[italic]{study.name}: mean in percent ± half the 95 % interval over seeds and orders[/]")
    for table in parts:
        console.print(table)
    console.print(KEY.format(reference=study.reference), style="dim", highlight=False)


def _rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Its rows, unknown numbers as null."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return rows


def _table(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(HEADINGS[column], justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def markdown_of(study: Study) -> str:
    """The same table in Markdown."""
    ruler = ("---", *("--:" for _ in HEADINGS[1:]))
    rows = [(f"`{label}`", *rest) for label, *rest in _rows(study)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADINGS, ruler, *rows))


def _rows(study: Study) -> Iterator[tuple[str, ...]]:
    """A row a method, in the order of the study."""
    summary, figures = study.summary(), study.figures()
    known = study.reference in study.labels
    paired = study.paired(figures=["mfn"]) if known else summary.head(0)  # without a reference no row
    fastest = figures[figures["figure"] == "minutes"].groupby("label")["value"].min()
    for label in study.labels:
        values = summary[summary["label"] == label].set_index("figure")
        against = paired[paired["label"] == label]
        yield (
            label,
            str(int(values["n"].max())),
            *(_with_interval(values, figure) for figure in SHOWN),
            *(("–", "–") if against.empty else _difference(against.iloc[0])),
            _number(fastest.get(label, nan), 1),
            *(_number(values["mean"].get(figure, nan), digits) for figure, _, digits in COSTS),
            {True: "yes", False: "no", None: "–"}[study.keeps_old_data(label)],
        )


def _say_missing(study: Study) -> None:
    if study.missing:
        first = study.missing[0]
        where = f"{first.done} of {first.tasks} tasks" if first.started else "not begun"
        named = f"{first.cell.label}, seed {first.cell.seed} ({where})"
        rest = f" and {len(study.missing) - 1} more" if len(study.missing) > 1 else ""
        said = f"{len(study.missing)} of {len(study.plan.cells)} cells are not complete: {named}{rest}"
        screen.print(f"[yellow]{said}[/]", highlight=False, soft_wrap=True)


def _with_interval(values: pd.DataFrame, figure: str) -> str:
    if figure not in values.index or values["n"][figure] == 0:
        return "–"
    half = (values["high"][figure] - values["low"][figure]) / 2
    return f"{values['mean'][figure]:.1f}" + ("" if half != half else f" ±{half:.1f}")


def _difference(row: pd.Series[Any]) -> tuple[str, str]:
    """Δ MFN and p; neither without a cell that both have."""
    difference, p = row["difference"], row["p_holm"]
    return "–" if isnan(difference) else f"{difference:+.1f}", "–" if isnan(p) else f"{p:.3f}"


def _number(value: float, digits: int) -> str:
    return "–" if isnan(value) else f"{value:.{digits}f}"


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
