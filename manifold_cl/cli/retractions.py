"""``manifold-cl retractions``: order, errors, time and memory of retractions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Option

from manifold_cl.cli.options import Device, Json, at_least, validate_device, validate_out
from manifold_cl.cli.screen import Screen, bars, print_table, screen
from manifold_cl.geometry import RETRACTIONS
from manifold_cl.plugins import unknown

if TYPE_CHECKING:
    from manifold_cl.geometry.lab import LabReport

METRICS = ("euclidean", "canonical")
HEADINGS = ("retraction", "order E", "order C", "error", "drift", "forward ms", "backward ms", "memory MB", "")


def retractions(
    shape: Annotated[str, Option(help="Rows and columns of the points.")] = "4096x16",
    complement: Annotated[int, Option(help="Number of protected directions.")] = 256,
    batch: Annotated[int, Option(callback=at_least(1), help="Points per call.")] = 64,
    dtype: Annotated[str, Option(help="Precision: float32 or float64.")] = "float32",
    device: Device = "cpu",
    steps: Annotated[int, Option(callback=at_least(1), help="Steps of the drift measurement.")] = 1000,
    only: Annotated[
        list[str] | None, Option(metavar="NAME", help="Retraction to measure; repeatable (default: all).")
    ] = None,
    plugin: Annotated[
        list[str] | None,
        Option(metavar="MODULE:NAME", help="Retraction of your own, as module:name or file.py:name; repeatable."),
    ] = None,
    plot: Annotated[Path | None, Option(help="File for the figure (png, pdf, svg).")] = None,
    as_json: Json = False,
) -> None:
    """Compare retractions: verified order, errors, drift, time and memory."""
    size = _shape(shape)
    _validate_room(size, complement)
    if unknown_names := [name for name in only or () if name not in list(RETRACTIONS)]:
        raise ValueError(unknown("retraction", unknown_names[0], sorted(RETRACTIONS)))
    if plot is not None:
        if plot.suffix not in (".svg", ".pdf", ".png"):
            raise ValueError(f"--plot is {plot}: figures are written as .svg, .pdf or .png")
        validate_out(plot.parent, "--plot")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"--dtype is float32 or float64, got {dtype!r}")
    validate_device(device)
    import torch

    from manifold_cl.continual.environment import library_versions, machine
    from manifold_cl.geometry.lab import load_plugin, measure_retractions

    own = [load_plugin(path) for path in plugin or ()]
    with bars() as progress:
        bar = progress.add_task("timing", total=None, note="", left="")
        report = measure_retractions(
            [*own, *(only or sorted(RETRACTIONS))],
            shape=size,
            complement=complement,
            batch=batch,
            dtype=getattr(torch, dtype),
            device=device,
            steps=steps,
            on_progress=lambda what, done, total: progress.update(bar, description=what, completed=done, total=total),
        )
    if as_json:
        content = {**report.to_dict(), "versions": library_versions(), "machine": machine()}
        print(json.dumps(content, indent=1, allow_nan=False))
    else:
        _print(report)
    for row in report.rows:
        for failure in row.failures:
            screen.say((row.name, "bold red"), f" violates a law: {failure}")
    if plot is not None:
        from manifold_cl.cli.analysis_package import analysis
        from manifold_cl.geometry.figures import plot_lab  # needs matplotlib

        analysis.save_figure(plot_lab(report), plot)
        (screen if as_json else Screen()).say(f"figure: {plot}")


def _print(report: LabReport) -> None:
    n, p = report.shape
    rows: list[tuple[str | Text, ...]] = [
        (
            row.name,
            *(_order(row.declared.get(metric), row.measured.get(metric)) for metric in METRICS),
            f"{row.error:.0e}",
            f"{row.drift:.0e}",
            f"{row.forward_ms:.1f}",
            "–" if row.backward_ms is None else f"{row.backward_ms:.1f}",
            f"{row.memory_mb:.0f}",
            _verdict(row.failures),
        )
        for row in report.rows
    ]
    title = f"{report.batch} × ({n} × {p}), {report.complement} directions protected, {report.dtype}, {report.device}"
    n, p, k = report.drift_shape
    key = (
        "order: measured as a slope, in the Euclidean (E) and the canonical (C) metric · error: largest |xᵀx − I| or "
        f"|Fᵀx| after a step · drift: the same in float32 after {report.steps} steps of length 0.3 at {n} × {p}, "
        f"{k} protected · memory: peak of the tensors inside one call"
    )
    print_table(f"{title}, {report.threads} thread(s)", HEADINGS, rows, key, wide=140)


def print_short(report: LabReport) -> None:
    """Print order, drift and time of each retraction."""
    rows: list[tuple[str | Text, ...]] = [
        (
            row.name,
            *(_order(row.declared.get(metric), row.measured.get(metric)) for metric in METRICS),
            f"{row.drift:.0e}",
            f"{row.forward_ms:.2f}",
            _verdict(row.failures),
        )
        for row in report.rows
    ]
    n, p = report.shape
    title = f"Retractions: {report.batch} × ({n} × {p}), {report.complement} directions protected, {report.dtype}"
    key = "order: slope in the Euclidean (E) and the canonical (C) metric · more columns: manifold-cl retractions"
    print_table(title, ("retraction", "order E", "order C", "drift", "forward ms", ""), rows, key)


def _verdict(failures: Sequence[str]) -> Text:
    return Text("broken", "red") if failures else Text("verified", "green")


def _order(declared: float | None, measured: float | None) -> str:
    if declared is None or measured is None:
        return "–"
    return "exact" if math.isinf(measured) else f"{measured:.2f}"


def _shape(text: str) -> tuple[int, int]:
    n, cross, p = text.lower().replace("×", "x").partition("x")
    if not cross or not n.isdigit() or not p.isdigit() or not int(n) or not int(p):
        raise ValueError(f"--shape is rows x columns, such as 4096x16, got {text!r}")
    return int(n), int(p)


def _validate_room(shape: tuple[int, int], complement: int) -> None:
    """Refuse more protected directions than leave room for the columns of a point."""
    n, p = shape
    if p > n:
        raise ValueError(f"--shape {n}x{p} has more columns than rows: a point has at most as many columns as rows")
    if not 0 <= complement <= n - p:
        raise ValueError(
            f"--complement {complement} does not fit --shape {n}x{p}: points with {n} rows and {p} columns leave room "
            f"for 0 to {n - p} protected directions; give fewer, or a --shape with more rows"
        )
