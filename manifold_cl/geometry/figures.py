"""Figures of check reports and of the lab. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

try:
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install matplotlib") from error

from manifold_cl.geometry.checks.measure import Curve, Report
from manifold_cl.geometry.lab import LabReport

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"),
    *("#7F7F7F", "#8C5109", "#882255", "#999933"),
)
"""Okabe and Ito's palette, safe for colour-blind readers, and four more; markers differ too."""
MARKERS = "osD^vP*Xh<>"
LINE: Any = {"markersize": 3.5, "linewidth": 1.2}
OK, BROKEN = COLOURS[2], COLOURS[1]
FLOOR = 1e-17
"""Where exact zeros are drawn on a logarithmic axis."""
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
    "axes.titlesize": 10,
}


def plot_report(report: Report, axes: Any = None) -> Any:
    """Draws a report: errors over step lengths if it has curves, else residuals as bars, orange where a law fails.

    Args:
        report: the result of a check.
        axes: a matplotlib Axes; those of a new figure if not given.

    Returns:
        The Axes.
    """
    with plt.rc_context(STYLE):
        if axes is None:
            axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")[1]
        if report.curves():
            _draw_curves(report.curves(), axes)
        else:
            _draw_residuals(report, axes)
        verdict = "all laws hold" if report.passed else f"fails {len(report.failures())} of {len(report.laws())} laws"
        axes.set_title(f"{report.name}: {verdict}", color="black" if report.passed else BROKEN, parse_math=False)
    return axes


def plot_lab(report: LabReport) -> Any:
    """A matplotlib Figure of the order in both metrics, the drift and the time of all retractions."""
    with plt.rc_context(STYLE):
        figure, ((euclidean, canonical), (drift, cost)) = plt.subplots(2, 2, figsize=(8.2, 6.6), layout="constrained")
        styles = {
            row.name: {"color": COLOURS[i % len(COLOURS)], "marker": _marker(i), **LINE}
            for i, row in enumerate(report.rows)
        }
        _draw_orders(report, "euclidean", euclidean, styles)
        _draw_orders(report, "canonical", canonical, styles)
        _draw_drift(report, drift, styles)
        _draw_cost(report, cost, styles)
        lines = [Line2D([], [], **style) for style in styles.values()]
        legend = figure.legend(lines, styles, loc="outside lower center", ncols=4, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names of plug-ins are no formulas
    return figure


def _marker(place: int) -> str:
    """The marker of a line: where the colours start again, the markers are one further."""
    return MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _draw_orders(report: LabReport, metric: str, axes: Any, styles: Mapping[str, Any]) -> None:
    for row in report.rows:
        if math.isfinite(row.measured.get(metric, math.inf)):
            curve = row.to_geodesic[metric]
            heights = [max(error, FLOOR) for error in curve.errors]
            axes.loglog(curve.lengths, heights, label=row.name, **styles[row.name])
    room = {1: 0, 2: 0}
    for order, words, corner in ((1, "first order, slope 2", 0.97), (2, "second order, slope 3", 0.03)):
        of_order = [row for row in report.rows if abs(row.measured.get(metric, 0) - order) < 0.5]
        if of_order:
            _, lengths, errors = of_order[0].to_geodesic[metric]
            names = fill(", ".join(row.name for row in of_order), 34)
            room[order] = 2 + names.count("\n")
            at: Any = {"va": "top", "ha": "left"} if order == 1 else {"va": "bottom", "ha": "right"}
            axes.annotate(
                f"{words}:\n{names}",
                (lengths[6], errors[6]),
                xytext=(1 - corner, corner),
                textcoords="axes fraction",
                color="0.25",
                fontsize=7,
                parse_math=False,
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkB": 4},
                **at,
            )
    _leave_corners(axes, above=room[1], below=room[2])
    axes.set(xlabel="length t of the step", ylabel="|R(x, tu) − exp(x, tu)|")
    axes.set_title(f"Order, {metric.replace('euclid', 'Euclid')} metric")


def _leave_corners(axes: Any, *, above: int, below: int) -> None:
    """Widens the range of errors until the lines of text in the upper left and lower right corner fit."""
    curves = [[math.log10(error) for error in line.get_ydata()] for line in axes.lines if line.get_label()[0] != "_"]
    if not curves:
        return
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    half = len(curves[0]) * 2 // 3  # of the lengths, equally spaced: the texts take less of the width
    share = {"above": 0.04 + 0.055 * above, "below": 0.04 + 0.055 * below}  # of the height, per line of text
    top = max(value for curve in curves for value in curve[:half]) if above else high
    floor = min(value for curve in curves for value in curve[-half:]) if below else low
    free = 1 - share["above"] - share["below"]
    height = max(high - low, (top - floor) / free)
    axes.set_ylim(10 ** min(low, floor - share["below"] * height), 10 ** max(high, top + share["above"] * height))


def _draw_drift(report: LabReport, axes: Any, styles: Mapping[str, Any]) -> None:
    for row in report.rows:
        axes.loglog(row.drift_steps, row.drift_errors, label=row.name, **styles[row.name])
    axes.axhline(2e-6, color="0.6", linewidth=0.8, linestyle="--")
    axes.annotate("bound", (1, 2e-6), xytext=(2, 2), textcoords="offset points", color="0.4", fontsize=8)
    axes.set(xlabel="steps", ylabel="constraint error, float32", title="Drift, steps of length 0.3")
    axes.set_ylim(1e-8, 1e-5 if max(row.drift for row in report.rows) < 1e-5 else None)


def _draw_cost(report: LabReport, axes: Any, styles: Mapping[str, Any]) -> None:
    for index, row in enumerate(report.rows[::-1]):
        colour = styles[row.name]["color"]
        axes.barh(index, row.forward_ms, color=colour, height=0.72)
        axes.barh(index, row.backward_ms or 0, left=row.forward_ms, color=colour, alpha=0.35, height=0.72)
    axes.set_yticks(range(len(report.rows)), [row.name for row in report.rows[::-1]], parse_math=False)
    n, p = report.shape
    axes.set_xlabel("milliseconds: forward, backward (pale)")
    axes.set_title(f"Time, {report.batch} × ({n} × {p}), {report.device}")


def _draw_curves(curves: Sequence[Curve], axes: Any) -> None:
    for curve, colour, marker in zip(curves, COLOURS, MARKERS, strict=False):
        errors = [max(error, FLOOR) for error in curve.errors]
        axes.loglog(curve.lengths, errors, color=colour, marker=marker, markersize=4, linewidth=1.3, label=curve.label)
    axes.set(xlabel="length t of the step", ylabel="error")
    axes.legend()


def _draw_residuals(report: Report, axes: Any) -> None:
    laws = report.laws()[::-1]
    values = [max(abs(law.value), FLOOR) for law in laws]
    axes.barh(range(len(laws)), values, left=FLOOR, color=[OK if law.holds else BROKEN for law in laws], height=0.6)
    axes.set_xscale("log")
    axes.set_yticks(range(len(laws)), [f"{law.name} ({law.wanted})" for law in laws])
    axes.set(xlabel="measured", xlim=(FLOOR, max(1e-8, 10 * max(filter(math.isfinite, values), default=0.0))))
