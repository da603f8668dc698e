"""Figure of merged adapters: the error of each task under each rule."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots import style
from analysis.plots.text import literal, name_text


@literal
def plot_merge(table: pd.DataFrame, *, metric: str = "error", ax: Axes | None = None) -> Axes:
    """One metric of `merge_table` by rule, one colour per task, with intervals where there are any.

    The dashed line at 1 is the error of a merge that leaves the task out, or its share retained in full.

    Raises:
        ValueError: the table has no such metric.
    """
    chosen = table[table["metric"] == metric]
    if chosen.empty:
        raise ValueError(f"no {metric!r} in the table; the metrics are {', '.join(style.unique(table['metric']))}")
    rules, tasks = style.unique(chosen["rule"]), style.unique(chosen["task"])
    axes = style.new_axes(ax, 2.4, max(style.COLUMN, 1.2 + 0.18 * len(rules) * len(tasks)))
    axes.axhline(1.0, color=style.FAINT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=0)
    shift = np.linspace(-0.25, 0.25, len(tasks)) if len(tasks) > 1 else np.zeros(1)
    for position, task in enumerate(tasks):
        rows = chosen[chosen["task"] == task].set_index("rule").loc[rules]
        color, marker = style.style_of(task, position)
        x = np.arange(len(rules)) + shift[position]
        known = rows["ci_low"].notna().to_numpy()
        axes.vlines(x[known], rows["ci_low"][known], rows["ci_high"][known], color=color, linewidth=1.4, zorder=1)
        axes.plot(x, rows["value"], linestyle="", marker=marker, markersize=4.5, color=color, label=name_text(task))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlim(-0.6, len(rules) - 0.4)
    style.label_columns(axes, rules, offset=0)
    names = {"error": "error / own change", "retained": "share retained", "foreign": "foreign / own change"}
    style.plain(axes, y=names.get(metric, metric))
    style.axes_legend(axes, own=ax is None)
    return axes
