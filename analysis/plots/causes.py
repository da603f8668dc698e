"""Figures of causes: responses to changed updates, effects of factors, and partial correlations of measures."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots.style import FAINT, INK, MARKERS, PALETTE, SMALL, plain
from analysis.plots.text import literal

NORMS = ("frobenius", "spectral", "nuclear")
OUTCOMES = {"forgetting_loss": "forgetting (nats)", "learning_loss": "learning (nats)"}
"""Outcome → the label of its axis."""
FLAT = "flatten 1 frobenius"
PANEL = (3.1, 2.5)
"""Width and height of a panel in inches."""


@literal
def plot_dose_response(effects: pd.DataFrame, method: str, *, outcomes: Mapping[str, str] = OUTCOMES) -> Figure:
    """Forgetting and learning against the entropy of the changed update, one column per norm that stays.

    `effects` is the table of `change_effects`. The curve goes through flattened, trained and sharpened updates;
    truncated ones are open squares. Bars are the table's intervals of the mean over replicates, absent for one. The
    star is the update as trained, and the dashed line 0: the model without the update.

    Raises:
        ValueError: the table has no row of the method, or none of a change of shape.
    """
    own = effects[effects["method"] == method]
    parts = own["change"].str.split(" ", expand=True).reindex(columns=range(3))
    own = own.assign(kind=parts[0], norm=parts[2])
    if own.empty or not own["norm"].isin(list(NORMS)).any():
        known = ", ".join(sorted(set(effects["method"]))) or "none"
        raise ValueError(f"no changes of shape of {method!r} in the table; its methods are {known}")
    figure = Figure(figsize=(len(NORMS) * PANEL[0], len(outcomes) * PANEL[1]), layout="constrained")
    grid = figure.subplots(len(outcomes), len(NORMS), squeeze=False, sharex=True, sharey="row")
    for number, (row, (outcome, title)) in enumerate(zip(grid, outcomes.items(), strict=True), start=1):
        table = own[own["outcome"] == outcome]
        trained = table[table["change"] == "trained"]
        for axes, norm in zip(row, NORMS, strict=True):
            part = table[table["norm"] == norm]
            curve = pd.concat([part[part["kind"].isin(["flatten", "sharpen"])], trained]).sort_values("entropy")
            axes.axhline(0.0, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
            _draw(axes, curve, PALETTE[0], "o", "flattened, sharpened", line=True)
            _draw(
                axes, part[part["kind"] == "truncate"].sort_values("entropy"), PALETTE[1], "s", "truncated", open_=True
            )
            axes.plot(trained["entropy"], trained["mean"], "*", color=INK, markersize=9, zorder=5, label="as trained")
            last = number == len(outcomes)
            plain(axes, x="spectral entropy / ln r" if last else "", y=title if axes is row[0] else "")
            if number == 1:
                axes.set_title(f"{'Frobenius' if norm == 'frobenius' else norm} norm stays", fontsize=SMALL + 1)
    grid[0, 0].legend(fontsize=SMALL, frameon=False)
    return figure


@literal
def plot_sizes(effects: pd.DataFrame, methods: Sequence[str], *, outcomes: Mapping[str, str] = OUTCOMES) -> Figure:
    """Forgetting against learning while the size of each method's updates changes and nothing else; star: as trained.

    `effects` is the table of `change_effects`. Below and right of another curve is better at every size. A cross is the
    flattened update of the same Frobenius norm: off its method's curve, shape acts beyond size.

    Raises:
        ValueError: no method has a change of size.
    """
    forgetting, learning = outcomes
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    drawn = 0
    for position, method in enumerate(methods):
        own = effects[effects["method"] == method]
        own = own[own["change"].str.startswith("scale ") | (own["change"] == "trained")]
        grid = own.pivot(index="change", columns="outcome", values=["mean", "frobenius"])
        if len(grid) < 2:
            continue
        grid = grid.sort_values(("frobenius", forgetting))
        x, y = grid["mean", learning], grid["mean", forgetting]
        color, marker = PALETTE[position], MARKERS[position]
        n = int(own["n"].max())
        axes.plot(x, y, color=color, marker=marker, markersize=4, label=f"{method} (n = {n})", linewidth=1.2)
        axes.plot(x["trained"], y["trained"], "*", color=color, markersize=11, zorder=5)
        flat = effects[(effects["method"] == method) & (effects["change"] == FLAT)].set_index("outcome")["mean"]
        if len(flat):
            axes.plot(flat[learning], flat[forgetting], "X", color=color, markersize=8, label=f"{method}, flattened")
        drawn += 1
    if not drawn:
        raise ValueError(f"no changes of size of {', '.join(methods)} in the table")
    axes.axhline(0.0, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
    plain(axes, x=outcomes[learning], y=outcomes[forgetting])
    axes.legend(fontsize=SMALL, frameon=False)
    return figure


@literal
def plot_mediation(table: pd.DataFrame) -> Figure:
    """Partial rank correlations of `mediation_table`, one row per measure and one marker per method.

    Bars are intervals over runs, absent for one run. Filled markers have p below 0.05 after Holm in every run.

    Raises:
        ValueError: the table is empty.
    """
    if table.empty:
        raise ValueError("the table of partial correlations is empty: measure the layers of a run first")
    measures, methods = list(dict.fromkeys(table["measure"])), list(dict.fromkeys(table["method"]))
    figure = Figure(figsize=(4.6, 0.8 + 0.55 * len(measures)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    for position, method in enumerate(methods):
        own = table[table["method"] == method].set_index("measure").reindex(measures)
        places = np.arange(len(measures)) + 0.16 * (position - (len(methods) - 1) / 2)
        color, known = PALETTE[position], own["value"].notna().to_numpy()
        for place, row in zip(places[known], own[known].itertuples(), strict=True):
            axes.plot([row.low, row.high], [place, place], color=color, linewidth=1.0)
            fill = color if row.p_holm < 0.05 else "white"
            axes.plot(row.value, place, MARKERS[position], color=color, markerfacecolor=fill, markersize=5)
        axes.plot([], [], MARKERS[position], color=color, label=f"{method} (n = {int(own['n'].max())})")
    if (table["p_holm"] >= 0.05).any():
        axes.plot([], [], "o", color=FAINT, markerfacecolor="white", label="open: p of 0.05 or more")
    axes.set_yticks(range(len(measures)), measures)
    axes.invert_yaxis()
    axes.set_xlim(-1, 1)
    plain(axes, x="partial rank correlation with forgetting")
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw(
    axes: Axes, rows: pd.DataFrame, color: str, marker: str, label: str, *, line: bool = False, open_: bool = False
) -> None:
    """Means with their intervals."""
    x, y = rows["entropy"].to_numpy(), rows["mean"].to_numpy()
    ends = np.stack([y - rows["low"].to_numpy(), rows["high"].to_numpy() - y])
    if np.isfinite(ends).all() and len(x):
        axes.errorbar(x, y, yerr=ends, fmt="none", ecolor=color, elinewidth=0.8)
    face = "white" if open_ else color
    axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=4, label=label, linestyle="-" if line else "")
