"""Figures of a report's findings: one pair of tasks against chance, changed answers, drift per layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.names import short_names
from analysis.plots import style
from analysis.plots.text import literal, name_text
from analysis.statistics.pairs import chance_interval
from analysis.tables.titles import TITLES

ANSWERS = {
    "top1_change": "answers that change (share)",
    "kl": "KL of the answers (nats)",
    "loss_change": "change of the loss (nats)",
    "loss_before": "loss before (nats)",
    "loss_after": "loss after (nats)",
}


@literal
def plot_against_chance(
    tested: pd.DataFrame,
    *,
    metric: str = "input_overlap",
    task_a: str | None = None,
    task_b: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One metric of one pair of tasks per layer, in the order of the model, against 95 % of random updates.

    `tested` is the table of `against_chance`; the pair is its first one if not given. Layers with ``p_holm`` below
    0.05 are filled, and the line is the value of all layers together.

    Raises:
        ValueError: the table has no such metric or pair.
    """
    chosen = tested[tested["metric"] == metric]
    for column, name in (("task_a", task_a), ("task_b", task_b)):
        chosen = chosen[chosen[column] == (name if name is not None or chosen.empty else chosen[column].iloc[0])]
    total, layers = chosen[chosen["layer"] == "total"], chosen[chosen["layer"] != "total"]
    if layers.empty or total.empty:
        raise ValueError(f"no {metric!r} of {task_a!r} and {task_b!r} against chance in the table")
    axes = style.new_axes(ax, 2.2)
    bounds = [
        chance_interval(metric, mean, std, shape)
        for mean, std, shape in zip(layers["chance"], layers["chance_std"], layers["chance_shape"], strict=True)
    ]
    index = np.arange(1, len(layers) + 1)
    low, high = np.array(bounds).T
    edges = np.append(index - 0.5, index[-1] + 0.5)
    band: dict[str, Any] = {"color": style.FAINT, "alpha": 0.35, "linewidth": 0}
    axes.fill_between(
        edges, np.append(low, low[-1]), np.append(high, high[-1]), step="post", label="random updates, 95 %", **band
    )
    beyond = (layers["p_holm"] < 0.05).to_numpy()
    size = 14 if len(index) <= 64 else 6
    for chosen_layers, face, name in ((beyond, style.PALETTE[1], "beyond chance"), (~beyond, "white", "other layers")):
        if chosen_layers.any():
            edge = style.PALETTE[1] if face != "white" else style.PALETTE[0]
            points: dict[str, Any] = {"s": size, "facecolor": face, "edgecolor": edge, "linewidth": 0.7}
            axes.scatter(index[chosen_layers], layers["value"].to_numpy()[chosen_layers], label=name, **points)
    axes.axhline(float(total["value"].iloc[0]), color=style.INK, linewidth=1.0, label="all layers")
    if metric != "alignment":
        axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    style.plain(axes, x="layer, in the order of the model", y=TITLES.get(metric, metric))
    style.axes_legend(axes, own=ax is None)
    return axes


@literal
def plot_answer_changes(
    intervals: pd.DataFrame, *, data: Sequence[str] | None = None, metric: str = "top1_change", ax: Axes | None = None
) -> Axes:
    """One metric of `answer_intervals` with its intervals: one row per data set and later task.

    Rows that compare a task's own data with the base model are left out.

    Raises:
        ValueError: the table has no such metric or data.
    """
    chosen = intervals[(intervals["metric"] == metric) & (intervals["data"] != intervals["task_b"])]
    if data is not None:
        chosen = chosen[chosen["data"].isin(list(data))]
    if chosen.empty:
        raise ValueError(f"no {metric!r} of {list(data) if data is not None else 'any data'} in the table")
    axes = style.new_axes(ax, 0.9 + 0.24 * len(chosen))
    at = np.arange(len(chosen))
    value = chosen["value"].to_numpy()
    low, high = (chosen[name].fillna(chosen["value"]).to_numpy() for name in ("ci_low", "ci_high"))
    error = np.clip(np.stack([value - low, high - value]), 0.0, None)
    look: dict[str, Any] = {"color": style.PALETTE[0], "ecolor": style.PALETTE[0], "capsize": 2.5}
    axes.errorbar(value, at, xerr=error, fmt="o", markersize=4, linewidth=1.2, **look)
    names = [
        f"{name_text(d, 18)} after {name_text(b, 18)}" for d, b in zip(chosen["data"], chosen["task_b"], strict=True)
    ]
    axes.set_yticks(at, names, fontsize=style.SMALL)
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    if metric == "loss_change":
        axes.axvline(0.0, color=style.INK, linewidth=0.8)
    else:
        axes.set_xlim(left=0.0)
    style.plain(axes, x=ANSWERS.get(metric, metric), grid=False)
    axes.grid(axis="x", color=style.MISSING, linewidth=0.6)
    return axes


@literal
def plot_layer_drift(drift: pd.DataFrame, *, shown: int = 8, ax: Axes | None = None) -> Axes:
    """The layers with the largest drift, with intervals: a table with layer, value, ci_low and ci_high.

    Raises:
        ValueError: the table is empty.
    """
    if drift.empty:
        raise ValueError("no layer to draw")
    chosen = drift.sort_values("value", ascending=False).head(shown)
    axes = style.new_axes(ax, 0.8 + 0.2 * len(chosen))
    at, value = np.arange(len(chosen)), chosen["value"].to_numpy()
    low, high = (chosen[name].fillna(chosen["value"]).to_numpy() for name in ("ci_low", "ci_high"))
    error = np.clip(np.stack([value - low, high - value]), 0.0, None)
    axes.barh(at, value, xerr=error, color=style.PALETTE[4], ecolor=style.INK, height=0.65, capsize=2)
    axes.set_yticks(at, [name_text(name, 26) for name in short_names([str(name) for name in chosen["layer"]])])
    axes.tick_params(labelsize=style.SMALL)
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    style.plain(axes, x="‖ΔW x‖² / ‖W x‖²", grid=False)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize=style.SMALL)
    axes.grid(axis="x", color=style.MISSING, linewidth=0.6)
    return axes
