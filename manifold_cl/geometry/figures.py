"""Figures of reports and of the lab; the one file here that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

try:
    import matplotlib.pyplot as plt
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install matplotlib") from error

if TYPE_CHECKING:
    from manifold_cl.geometry.checks.report import Curve, Report
    from manifold_cl.geometry.lab import LabReport

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F", "#8C5109")
"""Okabe and Ito's palette, safe for colour-blind readers, and two more."""
MARKERS = "osD^vP*Xh"
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


def draw_report(report: Report, axes: Any = None) -> Any:
    """Errors over step lengths in log-log axes, or residuals as bars, green where they hold and orange where not."""
    with plt.rc_context(STYLE):
        if axes is None:
            axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")[1]
        if report.curves():
            _draw_curves(report.curves(), axes)
        else:
            _draw_residuals(report, axes)
        verdict = "all laws hold" if report.passed else f"fails {len(report.failures())} of {len(report.laws())} laws"
        axes.set_title(f"{report.name}: {verdict}", color="black" if report.passed else BROKEN)
    return axes


def draw_lab(report: LabReport) -> Any:
    """Order, drift and cost of all retractions side by side; returns the Figure."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
        looks = {row.name: (COLOURS[i % 9], MARKERS[i % 9]) for i, row in enumerate(report.rows)}
        for row in report.rows:
            colour, marker = looks[row.name]
            errors = [max(error, FLOOR) for error in row.to_geodesic.errors]
            if math.isfinite(row.measured.get("euclidean", math.inf)):
                left.loglog(row.to_geodesic.lengths, errors, color=colour, marker=marker, markersize=3.5, linewidth=1.2)
            middle.loglog(row.drift_steps, row.drift_errors, color=colour, marker=marker, markersize=3.5, linewidth=1.2)
        _name_slopes(left, report)
        left.set(xlabel="length t of the step", ylabel="|R(x, tu) − exp(x, tu)|", title="Order, Euclidean metric")
        middle.axhline(2e-6, color="0.6", linewidth=0.8, linestyle="--")
        middle.annotate("promise", (1, 2e-6), xytext=(2, 2), textcoords="offset points", color="0.4", fontsize=8)
        middle.set(xlabel="steps", ylabel="constraint error, float32", title="Drift, steps of length 0.3")
        middle.set_ylim(1e-8, 1e-5 if max(row.drift for row in report.rows) < 1e-5 else None)
        rows = report.rows[::-1]
        places = range(len(rows))
        colours = [looks[row.name][0] for row in rows]
        right.barh(places, [row.forward_ms for row in rows], color=colours, height=0.72)
        right.barh(
            places,
            [row.backward_ms or 0 for row in rows],
            left=[row.forward_ms for row in rows],
            color=colours,
            alpha=0.35,
            height=0.72,
        )
        right.set_yticks(list(places), [row.name for row in rows])
        batch, (n, p) = report.batch, report.shape
        right.set(
            xlabel="milliseconds: forward, backward (pale)", title=f"Time, {batch} × ({n} × {p}), {report.device}"
        )
        for row in report.rows:
            colour, marker = looks[row.name]
            left.plot([], [], color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=row.name)
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=len(report.rows), fontsize=7.5
        )
    return figure


def _name_slopes(axes: Any, report: LabReport) -> None:
    """Say once which lines are of first and which of second order."""
    for order, words, below in ((1, "first order: slope 2", False), (2, "second order: slope 3", True)):
        of_order = [row for row in report.rows if abs(row.measured.get("euclidean", 0) - order) < 0.5]
        if of_order:
            t, error = of_order[0].to_geodesic.lengths[4], of_order[0].to_geodesic.errors[4]
            offset, align = ((8, -14), "left") if below else ((-4, 16), "right")
            axes.annotate(
                words, (t, error), xytext=offset, textcoords="offset points", ha=align, color="0.35", fontsize=8
            )


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
    axes.set(xlabel="measured", xlim=(FLOOR, max(1e-8, 10 * max(values))))
