"""Final accuracy against accuracy just after learning, one point per method."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from analysis.plots import methods
from analysis.plots.labels import label_points
from analysis.plots.style import FAINT, MISSING, SMALL, TEXT, new_axes, plain
from analysis.plots.text import figure_of, literal, make_room
from analysis.studies import StudyResults

Box = tuple[float, ...]
"""Left, bottom, right and top, in pixels."""
PLACES = 7
"""Number of positions along the diagonal that its name may have."""
TILES = 9
"""Boxes that cover slanted words."""


@literal
def plot_trade_off(
    study: StudyResults, *, level: float = 0.95, highlight: Collection[str] = (), ax: Axes | None = None
) -> Axes:
    """MFN against MFT, one point per method with its interval; on the diagonal nothing was forgotten.

    Blue circles compete, the black square is the study's reference, `highlight` names labels for orange diamonds.
    Methods that keep old data are grey triangles. Zero-shot and joint training are horizontal lines at their MFN.
    Bars that reach far beyond all points are cut at the frame.

    Raises:
        ValueError: no cell is complete, or a highlighted label has none.
    """
    values = methods.method_values(study, level, highlight)
    axes = new_axes(ax, 3.6, 4.6)
    draw_trade_off(axes, study, values, highlight, TEXT)
    methods.write_below(axes, methods.bars_note(study, level))
    make_room(figure_of(axes))
    label_trade_off(axes, study, values, highlight, SMALL)
    return axes


def _lines(study: StudyResults) -> dict[str, str]:
    """Methods that are lines rather than points: label to what is written on the line."""
    names = {"zero_shot": "zero-shot", "joint": "joint"}
    return {label: names[method] for label in study.labels if (method := study.methods[label].method) in names}


def _points(study: StudyResults, values: methods.Values) -> dict[str, tuple[methods.Triple, methods.Triple]]:
    points = methods.points(study, values, "mft")
    return {label: point for label, point in points.items() if label not in _lines(study)}


def draw_trade_off(
    axes: Axes, study: StudyResults, values: methods.Values, highlight: Collection[str], size: float
) -> None:
    """Draw points and lines. `label_trade_off` adds names after the figure's layout is final."""
    points = _points(study, values)
    lines = {label: values[label, "mfn"] for label in _lines(study) if (label, "mfn") in values}
    for label, (x, y) in points.items():
        methods.draw_point(axes, x, y, methods.look_of(study, label, highlight), size)
    for _, low, high in lines.values():
        if high > low:
            axes.axhspan(low, high, color=MISSING, linewidth=0, zorder=0)
    for mean, _, _ in lines.values():
        axes.axhline(mean, color=FAINT, linewidth=1.0, linestyle=(0, (5, 2)), zorder=1)
    plain(axes, x="MFT: just learned (%)", y="MFN: at the end (%)", grid=False)
    axes.set_xlim(*methods.limits([x for x, _ in points.values()]))
    low, high = methods.limits([*(y for _, y in points.values()), *lines.values()])
    axes.set_ylim(low, high + 0.12 * (high - low))  # the best crowd at the top, and so do their names
    axes.axline((0, 0), slope=1, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)  # nothing forgotten
    methods.set_text_size(axes, size)


def label_trade_off(
    axes: Axes, study: StudyResults, values: methods.Values, highlight: Collection[str], size: float
) -> None:
    """Write the names of lines and points."""
    points = _points(study, values)
    taken = [bar for point in points.values() for bar in _bars(axes, *point)]
    left = axes.get_xlim()[0]
    for label, name in _lines(study).items():
        if (label, "mfn") in values:
            mean = values[label, "mfn"][0]
            text: dict[str, Any] = {"textcoords": "offset points", "fontsize": size - 1, "color": "#666666"}
            written = axes.annotate(f"{name} {mean:.1f}", (left, mean), (3, 2), **text)
            taken.append(tuple(written.get_window_extent().extents))
    places = [(x[0], y[0]) for x, y in points.values()]
    taken += _write_no_forgetting(axes, size - 1, [*taken, *_marks(axes, places, size)])
    colors = [methods.look_of(study, label, highlight).color for label in points]
    label_points(axes, list(points), places, colors, size=size, taken=taken)


def _write_no_forgetting(axes: Axes, size: float, avoided: Sequence[Box]) -> list[Box]:
    """Write the name of the diagonal along it, where it is farthest from what is drawn; the boxes that it fills.

    All in pixels. Of equally good places the uppermost is taken. A diagonal that is too short has no name.
    """
    figure = figure_of(axes)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    start, end = max(left, bottom), min(right, top)
    if end <= start:
        return []
    unit = figure.dpi / 72
    lower, upper = axes.transData.transform([(start, start), (end, end)])
    length = float(np.hypot(*(upper - lower)))
    along = (upper - lower) / length
    away = np.array([-along[1], along[0]])  # to the upper left, where less than nothing is forgotten
    written = axes.annotate("no forgetting", (start, start), fontsize=size, color="#666666")
    width, height = written.get_window_extent().size
    half = min(0.5 * width + height, 0.5 * length)  # the words stay this far from both ends
    centres = [
        lower + reach * along + (0.5 * height + 1.5 * unit) * away for reach in np.linspace(length - half, half, PLACES)
    ]
    steps = np.linspace(-0.5, 0.5, TILES)[:, None] * (width - height) * along
    tiles = [np.concatenate([centre + steps - height / 2, centre + steps + height / 2], axis=1) for centre in centres]
    inside = [(boxes.min() >= 0) & (boxes[:, 2:] <= figure.bbox.size).all() for boxes in tiles]
    if not any(inside):  # the diagonal only touches a corner
        written.remove()
        return []
    best = int(np.argmax([_gap(boxes, avoided) if fits else -1.0 for boxes, fits in zip(tiles, inside, strict=True)]))
    written.set(rotation=float(np.degrees(np.arctan2(along[1], along[0]))), rotation_mode="anchor")
    written.set(ha="center", va="center", in_layout=False)
    written.set_position(tuple((centres[best] - lower) / unit))
    written.set_anncoords("offset points")
    return [tuple(box) for box in tiles[best]]


def _gap(boxes: NDArray[np.float64], avoided: Sequence[Box]) -> float:
    """The smallest distance between one of ``boxes`` (k, 4) and one of ``avoided``."""
    if not avoided:
        return np.inf
    others = np.asarray(avoided, dtype=np.float64)
    apart = np.maximum(others[:, None, :2] - boxes[:, 2:], boxes[:, :2] - others[:, None, 2:]).clip(min=0.0)
    return float(np.hypot(apart[..., 0], apart[..., 1]).min())


def _marks(axes: Axes, places: Sequence[tuple[float, float]], size: float) -> list[Box]:
    """The boxes that markers cover, by the size of the text around them, in pixels."""
    figure = figure_of(axes)
    reach = 0.4 * size * figure.dpi / 72
    return [tuple(np.concatenate([at - reach, at + reach])) for at in map(axes.transData.transform, places)]


def _bars(axes: Axes, x: methods.Triple, y: methods.Triple) -> list[Box]:
    """Intervals of a point as thin rectangles, in pixels."""
    ends = [((x[1], y[0]), (x[2], y[0])), ((x[0], y[1]), (x[0], y[2]))]
    return [
        tuple(np.concatenate([low - 1, high + 1]))
        for low, high in (axes.transData.transform(pair) for pair in ends if np.isfinite(pair).all())
    ]
