"""Figures of a suite: performance profiles, and the gap and distance of every contestant. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

try:
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, PercentFormatter
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install matplotlib") from error

from manifold_cl.lab.performance_profiles import area
from manifold_cl.lab.suite import MOST, UNITS, SuiteReport, retraction_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's palette, safe for colour-blind readers."""
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
GREY = "0.8"
EMPHASISED = 4
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
    "axes.titlesize": 10,
}
LABELS = {"evaluations": "gradients", "seconds": "CPU seconds"}
FLOOR = 1e-9
"""Gaps below are drawn here."""

Curves = Mapping[str, Sequence[tuple[float, float]]]


def plot_profiles(report: SuiteReport) -> Any:
    """A matplotlib Figure of performance profiles: steps above, retractions below; few lines in colour, others grey.

    The lines in colour are plug-ins, and those with the largest sum of areas over both units.
    """
    rows = [(title.capitalize(), names) for title, names in report.sets().items() if len(names) > 1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(rows), 2, figsize=(8.6, 0.6 + 3.1 * len(rows)), layout="constrained", squeeze=False, sharey=True
        )
        for (title, names), pair in zip(rows, axes, strict=True):
            curves = {unit: report.profiles(unit, names=names) for unit in UNITS}
            looks = _looks(emphasised(report, curves, names))
            for unit, panel in zip(UNITS, pair, strict=True):
                _draw_profiles(curves[unit], looks, panel)
                panel.set_title(f"{title}: {LABELS[unit]}")
            pair[0].set_ylabel("share of instances solved")
            pair[1].legend(*_legend(looks, _short(report, names)), loc="center left", bbox_to_anchor=(1.0, 0.5))
        for panel in axes[-1]:
            panel.set_xlabel("within this factor of the best")
    return figure


def plot_curves(report: SuiteReport) -> Any:
    """A matplotlib Figure with three panels per problem: gap against evaluations and seconds, and the distance."""
    names = report.sets()["steps"]
    curves = {unit: report.profiles(unit, names=names) for unit in UNITS}
    looks = _looks(emphasised(report, curves, names))
    problems = [problem.name for problem in report.problems]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(problems), 3, figsize=(9.6, 0.7 + 1.9 * len(problems)), layout="constrained", squeeze=False
        )
        for problem, row in zip(problems, axes, strict=True):
            results = {r.contestant: r for r in report.results if r.problem == problem and r.contestant in names}
            for name in sorted(results, key=lambda name: name in looks):
                entries = results[name].runs[0].entries
                look = looks.get(name, {"color": GREY, "linewidth": 0.8, "zorder": 1})
                gaps = [max(entry.gap, FLOOR) for entry in entries]
                row[0].loglog([1 + entry.evaluations for entry in entries], gaps, **look)
                row[1].loglog([1e-3 + entry.seconds for entry in entries], gaps, **look)
                errors = [max(entry.orthonormality, entry.leak, 1e-17) for entry in entries]
                row[2].loglog([1 + entry.evaluations for entry in entries], errors, **look)
            row[0].set_ylabel(problem.replace("_", "\n"))
            for panel in row[:2]:
                panel.axhline(report.budget.gap, color="0.6", linewidth=0.8, linestyle=":")
                panel.set_ylim(FLOOR / 2, 3)
            row[2].set_ylim(1e-17, 1)
        for panel, words in zip(axes[0], ("gap", "gap", "distance to the manifold"), strict=True):
            panel.set_title(words)
        for panel, words in zip(axes[-1], ("gradients", "CPU seconds", "gradients"), strict=True):
            panel.set_xlabel(words)
        figure.legend(*_legend(looks, {}), loc="outside lower center", ncols=4)
    return figure


def emphasised(report: SuiteReport, curves: Mapping[str, Curves], names: Sequence[str]) -> list[str]:
    """The names drawn in colour: plug-ins, and those with the largest sum of areas over both units."""

    def score(name: str) -> float:
        return -sum(area(curves[unit][name], MOST) for unit in UNITS)

    plugins = [c.label for c in report.contestants if c.plugin and c.label in names and c.label in curves[UNITS[0]]]
    best = sorted(curves[UNITS[0]], key=score)[:EMPHASISED]
    return list(dict.fromkeys([*plugins, *best]))[: len(COLOURS)]


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"color": colour, "linestyle": dash, "linewidth": 2.0, "zorder": 3}
        for name, colour, dash in zip(names, COLOURS, DASHES, strict=False)
    }


def _short(report: SuiteReport, names: Sequence[str]) -> dict[str, str]:
    """Label → the retraction's name, where all labels share their step."""
    contestants = [c for c in report.contestants if c.label in names]
    if len({c.step.name for c in contestants}) > 1:
        return {}
    return {c.label: retraction_of(c) or c.label for c in contestants}


def _legend(looks: Mapping[str, Mapping[str, Any]], short: Mapping[str, str]) -> tuple[list[Any], list[str]]:
    lines = [Line2D([], [], **look) for look in looks.values()]
    return [*lines, Line2D([], [], color=GREY)], [*(short.get(name, name) for name in looks), "others"]


def _draw_profiles(curves: Curves, looks: Mapping[str, Mapping[str, Any]], panel: Any) -> None:
    for name in sorted(curves, key=lambda name: name in looks):
        look = looks.get(name, {"color": GREY, "linewidth": 0.9, "zorder": 1})
        ratios, shares = zip(*((1.0, 0.0), *curves[name]), strict=True)
        panel.step([*ratios, MOST], [*shares, shares[-1]], where="post", **look)
    panel.set_xscale("log")
    panel.set_xlim(1, MOST)
    panel.set_ylim(0, 1.02)
    panel.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    panel.xaxis.set_minor_locator(FixedLocator([]))
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
