"""``manifold-cl retractions``: the lab on the terminal, as a figure, as data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from manifold_cl.cli.screen import Words, bars, check_device, check_out, output, screen
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.geometry.lab import LabReport, load_plugin, measure_retractions
from manifold_cl.geometry.retractions import RETRACTIONS

SHORT = {"euclidean": "E", "canonical": "C"}


def retractions(
    shape: Annotated[str, typer.Option(help="Rows and columns of the points.")] = "4096x16",
    complement: Annotated[int, typer.Option(help="Protected directions.")] = 256,
    batch: Annotated[int, typer.Option(help="Points a call.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="Where costs are measured.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Steps of the drift walk.")] = 1000,
    only: Annotated[list[str] | None, typer.Option(help="Name to measure; repeat for several (default: all).")] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="A retraction of your own: module:name or file.py:name; repeatable.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the figure here (png, pdf, svg).")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers here as JSON.")] = None,
) -> None:
    """Every retraction side by side: verified order, error, drift, time and memory."""
    check_device(device)
    if plot is not None and plot.suffix not in (".svg", ".pdf", ".png"):  # before minutes of measuring
        raise ValueError(f"--plot is {plot}: figures are written as .svg, .pdf or .png")
    for option, path in (("--plot", plot), ("--json", json)):
        if path is not None:
            check_out(path.parent, option)
    chosen = only or sorted(RETRACTIONS)
    own = [load_plugin(path) for path in plugin or ()]
    columns = (SpinnerColumn(), Words("{task.description}", "bold"), BarColumn(), TimeElapsedColumn())
    with bars(*columns) as progress:
        bar = progress.add_task("timing", total=None)
        report = measure_retractions(
            [*own, *chosen],
            shape=_shape(shape),
            complement=complement,
            batch=batch,
            dtype=_dtype(dtype),
            device=device,
            steps=steps,
            on_progress=lambda what, done, every: progress.update(bar, description=what, completed=done, total=every),
        )
    output(140).print(_table(report))
    for row in report.rows:
        for said in row.failures:
            screen.say((row.name, "bold red"), f" breaks a promise: {said}")
    if plot is not None:
        from manifold_cl.cli.analysis_package import save_figure
        from manifold_cl.geometry.figures import plot_lab  # needs matplotlib

        save_figure(plot_lab(report), plot)
        screen.say(f"figure: {plot}")
    if json is not None:
        write_json(json, {**report.to_dict(), "versions": library_versions(), "machine": machine()})
        screen.say(f"numbers: {json}")


def _table(report: LabReport) -> Table:
    n, p = report.shape
    table = Table(
        title=f"{report.batch} × ({n} × {p}), {report.complement} directions protected, {report.dtype}, "
        f"{report.device}, {report.threads} thread(s)",
        title_justify="left",
        caption=_caption(report),
        caption_justify="left",
    )
    for column in ("retraction", "order E", "order C", "error", "drift", "forward ms", "backward ms", "memory MB", ""):
        table.add_column(column, justify="left" if column in ("retraction", "") else "right")
    for row in report.rows:
        table.add_row(
            row.name,
            *(_order(row.declared.get(metric), row.measured.get(metric)) for metric in SHORT),
            f"{row.error:.0e}",
            f"{row.drift:.0e}",
            f"{row.forward_ms:.1f}",
            "–" if row.backward_ms is None else f"{row.backward_ms:.1f}",
            f"{row.memory_mb:.0f}",
            Text("broken", "red") if row.failures else Text("verified", "green"),
        )
    return table


def _caption(report: LabReport) -> str:
    n, p, k = report.drift_shape
    return (
        "order: measured as a slope, in the Euclidean (E) and the canonical (C) metric · error: largest |xᵀx − I|, "
        f"|Fᵀx| after a step · drift: the same in float32 after {report.steps} steps of length 0.3 at {n} × {p}, "
        f"{k} protected · memory: tensors alive at once inside"
    )


def _order(declared: float | None, measured: float | None) -> str:
    if declared is None or measured is None:
        return "–"
    return "exact" if math.isinf(measured) else f"{measured:.2f}"


def _shape(text: str) -> tuple[int, int]:
    n, cross, p = text.lower().replace("×", "x").partition("x")
    if not cross or not n.isdigit() or not p.isdigit() or not int(n) or not int(p):
        raise ValueError(f"--shape is rows x columns, such as 4096x16, got {text!r}")
    return int(n), int(p)


def _dtype(text: str) -> Any:
    known = {"float32": torch.float32, "float64": torch.float64}
    if text not in known:
        raise ValueError(f"--dtype is float32 or float64, got {text!r}: points are not kept in less")
    return known[text]
