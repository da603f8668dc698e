"""Methods of a study as points: colours by role, means with intervals, limits of axes."""

from collections import Counter
from collections.abc import Collection, Mapping
from math import nan
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from analysis.plots.style import PALETTE, SMALL
from analysis.studies import TIMES, StudyResults

Triple = tuple[float, float, float]
"""Mean, low and high end of its interval."""
Values = Mapping[tuple[str, str], Triple]
"""By label and figure."""


BEYOND = 0.4
"""Share of the range of the means that intervals may add on either side: one long bar should not crowd the points."""


class Look(NamedTuple):
    """Colour and marker of a method, by its role in the study."""

    color: str
    marker: str
    filled: bool = True


def look_of(study: StudyResults, label: str, highlight: Collection[str]) -> Look:
    """Orange diamond if highlighted, black square for the reference, blue circle if competing, else grey triangle."""
    if label in highlight:
        return Look(PALETTE[1], "D")
    if label == study.reference:
        return Look("#000000", "s")
    return Look(PALETTE[0], "o") if label in study.competing else Look("#666666", "^", filled=False)


def method_values(study: StudyResults, level: float, highlight: Collection[str]) -> dict[tuple[str, str], Triple]:
    """Label and figure to mean and interval, unknown ones left out.

    Times are those of the fastest cell, without an interval; ``stored_mb`` is updates and state together.
    """
    if not study.labels:
        raise ValueError(f"no cell of the study {study.name!r} is complete: there is nothing to draw yet")
    if unknown := [label for label in highlight if label not in study.labels]:
        raise ValueError(f"no complete cell has the label {unknown[0]!r}; there are {', '.join(study.labels)}")
    values: dict[tuple[str, str], Triple] = {
        (label, figure): (mean, low, high)
        for label, figure, n, mean, _, low, high in study.summary(level).itertuples(index=False)
        if n > 0
    }
    for figure in TIMES:
        fastest = study.fastest(figure)
        values |= {(label, figure): (fastest[label], nan, nan) for label in fastest if (label, figure) in values}
    for label in study.labels:
        parts = [values[label, key][0] for key in ("updates_mb", "state_mb") if (label, key) in values]
        if len(parts) == 2:
            values[label, "stored_mb"] = (sum(parts), nan, nan)
    return values


def points(study: StudyResults, values: Values, figure: str) -> dict[str, tuple[Triple, Triple]]:
    """Label to `figure` and MFN, where both are known."""
    known = [label for label in study.labels if (label, figure) in values and (label, "mfn") in values]
    return {label: (values[label, figure], values[label, "mfn"]) for label in known}


def bars_note(study: StudyResults, level: float) -> str:
    """The meaning of a figure's bars, in one line; empty where no method has two complete cells."""
    counts = Counter(cell.label for cell in study.records)
    if max(counts.values()) < 2:
        return ""
    return f"bars: {100 * level:g} % intervals of the mean over {study.replicates}, same tasks and test texts"


def draw_point(axes: Axes, x: Triple, y: Triple, look: Look, size: float) -> None:
    """Draw a mean with its intervals, where there are any; `size` is the size of the text around it."""
    style: dict[str, Any] = {"color": look.color, "linewidth": 1.0, "alpha": 0.6, "zorder": 2}
    if np.isfinite(x[1:]).all():
        axes.plot(x[1:], [y[0]] * 2, **style)
    if np.isfinite(y[1:]).all():
        axes.plot([x[0]] * 2, y[1:], **style)
    face = look.color if look.filled else "white"
    axes.plot(x[0], y[0], look.marker, color=look.color, markerfacecolor=face, markersize=0.6 * size, zorder=3)


def write_below(axes: Axes, note: str) -> None:
    """Write small lines below the name of the abscissa."""
    if note:
        axes.set_xlabel(f"{axes.get_xlabel()}\n{fill(note, 46)}", fontsize=SMALL)


def limits(values: list[Triple]) -> tuple[float, float]:
    """Limits that hold all means, and intervals up to `BEYOND` of the range of the means beyond them."""
    means = np.array([mean for mean, _, _ in values], dtype=float)
    if not means.size:
        return 0.0, 100.0
    low, high = float(means.min()), float(means.max())
    reach = max(high - low, 2.0)  # two points at least: small differences should look small
    ends = np.array([end for _, *ends in values for end in ends], dtype=float)
    ends = np.clip(ends[np.isfinite(ends)], low - BEYOND * reach, high + BEYOND * reach)
    bottom, top = min([low - 0.1 * reach, *ends]), max([high + 0.1 * reach, *ends])
    return bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom)


def set_text_size(axes: Axes, size: float) -> None:
    """Set the names of the axes to `size` points, their ticks to one less."""
    axes.tick_params(which="both", labelsize=size - 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(size)
