"""Runs as a table on the terminal or in JSON, a row a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isnan

from rich.console import Console
from rich.table import Table

from manifold_cl import RunRecord
from manifold_cl.cli.screen import screen

FIGURES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")
CAPTION = (
    "MFT just learned · MFN at the end · MAA average on the way · BWT change of earlier tasks · FWT on tasks not yet "
    "learned · constraint: largest |xᵀx − I|, |Fᵀx|"
)


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
                "metrics": {k: None if isnan(v) else v for k, v in r.metrics.items()},
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
    return "–" if value is None or isnan(value) else f"{value:.1f}"
