"""Faults of a figure's layout, measured with matplotlib's own extents."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray

Array = NDArray[np.float64]
TOUCHING = 1.5
"""Pixels (at 100 per inch) that boxes of text may share: ascents and descents are mostly empty."""
OUTSIDE = 1.0
"""Pixels that a box may reach over the edge of the canvas: hinting rounds to whole pixels."""
SAMPLES = 40
"""Points per segment of a line that a legend is compared with."""


class Box(NamedTuple):
    """A text and its rectangle, which may be slanted: corners (4, 2) in pixels."""

    words: str
    corners: Array


def faults(drawing: Axes | Figure) -> list[str]:
    """One sentence per fault: cut text, texts that overlap, legends over data, two curves that look the same."""
    figure = drawing.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    boxes = [box_of(text) for text in shown_texts(figure)]
    return [
        *(f"cut by the canvas: {box.words!r}" for box in boxes if _is_cut(box, figure)),
        *(f"cut by the canvas: the legend {box.words!r}" for box in _legend_boxes(figure) if _is_cut(box, figure)),
        *(f"overlap: {a.words!r} and {b.words!r}" for a, b in _overlapping(boxes)),
        *_legends_over_data(figure),
        *_same_looks(figure),
    ]


def shown_texts(figure: Figure) -> list[Text]:
    """Texts that are drawn: of ticks, only those within the limits."""
    hidden: set[Text] = set()
    for axes in figure.axes:
        if not axes.get_visible():
            hidden.update(axes.findobj(Text))
            continue
        for axis in (axes.xaxis, axes.yaxis):
            drawn = axis._update_ticks() if axis.get_visible() and axes.axison else []  # type: ignore[attr-defined]
            kept = {label for tick in drawn for label in (tick.label1, tick.label2)}
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden.update(label for tick in ticks for label in (tick.label1, tick.label2) if label not in kept)
    return [
        text
        for text in figure.findobj(Text)
        if isinstance(text, Text) and text not in hidden and text.get_visible() and text.get_text().strip()
    ]


def box_of(text: Text) -> Box:
    """The rectangle of a text. A slanted one has the centre of the upright box around it."""
    around = Text.get_window_extent(text)  # an annotation's own extent would count its arrow
    angle = text.get_rotation()
    turn = np.deg2rad(angle)
    if angle % 90:
        text.set_rotation(0)
        level = Text.get_window_extent(text)
        text.set_rotation(angle)
        half = np.array([level.width, level.height]) / 2
    else:
        half, turn = np.array([around.width, around.height]) / 2, 0.0
    centre = np.array([(around.x0 + around.x1) / 2, (around.y0 + around.y1) / 2])
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return Box(text.get_text(), centre + (signs * half) @ rotation)


def _is_cut(box: Box, figure: Figure) -> bool:
    low, high = box.corners.min(0), box.corners.max(0)
    reach = OUTSIDE * figure.dpi / 100
    return bool((low < -reach).any() or (high > np.array(figure.bbox.size) + reach).any())


def _overlapping(boxes: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """Pairs whose rectangles share more than a sliver, by the theorem of separating axes."""
    for a, b in combinations(boxes, 2):
        if (a.corners.max(0) <= b.corners.min(0)).any() or (b.corners.max(0) <= a.corners.min(0)).any():
            continue
        sides = [box.corners[k + 1] - box.corners[k] for box in (a, b) for k in (0, 1)]
        depths = []
        for side in sides:
            way = side / max(float(np.hypot(*side)), 1e-9)  # pixels: an empty side separates nothing
            first, second = a.corners @ way, b.corners @ way
            depths.append(min(first.max(), second.max()) - max(first.min(), second.min()))
        if min(depths) > TOUCHING:
            yield a, b


def _legends(figure: Figure) -> list[Legend]:
    found = [*figure.legends, *(legend for axes in figure.axes for legend in axes.findobj(Legend))]
    return [legend for legend in dict.fromkeys(found) if isinstance(legend, Legend)]


def _words(legend: Legend) -> str:
    return ", ".join(text.get_text() for text in legend.get_texts())


def _legend_boxes(figure: Figure) -> Iterator[Box]:
    """The frames of legends, which hold the samples of the lines too."""
    for legend in _legends(figure):
        frame = legend.get_window_extent()
        yield Box(_words(legend), np.array([frame.min, [frame.x1, frame.y0], frame.max, [frame.x0, frame.y1]]))


def texts_over_data(figure: Figure) -> list[str]:
    """One sentence per text inside axes that covers points of a curve."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        points = _data(axes)
        for text in axes.texts:
            low, high = Text.get_window_extent(text).min + TOUCHING, Text.get_window_extent(text).max - TOUCHING
            if count := int(((points > low) & (points < high)).all(1).sum()):
                found.append(f"text over data: {text.get_text()!r} covers {count} points")
    return found


def _legends_over_data(figure: Figure) -> Iterator[str]:
    for legend in _legends(figure):
        frame = legend.get_window_extent()
        for axes in (axes for axes in figure.axes if axes.get_visible()):
            points = _data(axes)
            inside = (points > frame.min + TOUCHING).all(1) & (points < frame.max - TOUCHING).all(1)
            if inside.any():
                yield f"legend over data: {_words(legend)!r} covers {int(inside.sum())} points"


def _data(axes: Axes) -> Array:
    """Points in pixels on all curves, markers and bars, cut at the axes."""
    parts = [np.zeros((0, 2))]
    for line in axes.lines:
        ends = line.get_transform().transform(np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float))
        shares = np.linspace(0, 1, SAMPLES)[:, None, None]
        parts += [(ends[:-1] + shares * np.diff(ends, axis=0)).reshape(-1, 2), ends]
    for points in axes.collections:
        if isinstance(points, PathCollection):
            parts.append(np.asarray(points.get_offset_transform().transform(points.get_offsets())))
    for bar in axes.patches:
        if isinstance(bar, Rectangle):
            low, high = bar.get_window_extent().min, bar.get_window_extent().max
            parts.append(np.array([low + share * (high - low) for share in np.ndindex(2, 2)] + [(low + high) / 2]))
    points = np.concatenate(parts)
    points = points[np.isfinite(points).all(1)]
    low, high = axes.bbox.min - 1, axes.bbox.max + 1
    return np.asarray(points[((points >= low) & (points <= high)).all(1)])


def _same_looks(figure: Figure) -> Iterator[str]:
    """Curves with a name of their own that a reader cannot tell apart."""
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        looks: dict[object, str] = {}
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            if isinstance(handle, Line2D):
                look = (handle.get_color(), str(handle.get_marker()), str(handle.get_linestyle()))
                look += (handle.get_fillstyle(), str(handle.get_markerfacecolor()))
            elif isinstance(handle, PathCollection):
                outline = handle.get_paths()[0].vertices.round(6).tobytes()
                look = (handle.get_facecolor().tobytes(), outline)  # type: ignore[assignment]
            else:
                continue
            if looks.setdefault(look, name) != name:
                yield f"one look for two curves: {looks[look]!r} and {name!r}"
