"""Placement of names beside points, without overlap."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from analysis.plots.style import FAINT, SMALL
from analysis.plots.text import figure_of, name_text

Array = NDArray[np.float64]
RADII = (5.0, 9.0, 15.0, 23.0, 33.0, 45.0, 60.0)
"""Distances from a point to its label in points of text, tried in turn."""
DIRECTIONS = 24
MARKER = 4.0
"""Half the side of the square around a point that a label should leave free, in points of text."""
SWEEPS = 6
ROUNDING = 1e-6
"""An area of overlap, in points of text squared, that is rounding: sides that touch."""
TOUCHED = 20.0
"""What any overlap of two labels costs beside its area, in points of text squared: slivers cross out letters."""
LEADER = 10.0
"""From this distance on, in points of text, a line leads from the point to its label."""


def place_boxes(
    points: ArrayLike, sizes: ArrayLike, frame: Sequence[float], taken: ArrayLike = (), *, unit: float = 1.0
) -> Array:
    """Centres (k, 2) of boxes beside k points that overlap neither each other nor points, if possible.

    Every box minimises its overlap with other boxes, with points, with the rectangles in `taken` (low x, low y,
    high x, high y) and with the outside of `frame`, then its distance from its point; the right side is preferred.
    Boxes move in a few sweeps. `unit` is the length of a point of text. O(k²) per sweep.
    """
    centres, extents = np.asarray(points, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    count = len(centres)
    blocked = np.concatenate(
        [np.hstack([centres - MARKER * unit, centres + MARKER * unit]), np.asarray(taken, dtype=float).reshape(-1, 4)]
    )
    angles = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    ways = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    radii = np.repeat(np.array(RADII) * unit, DIRECTIONS)
    steps = np.tile(ways, (len(RADII), 1))
    # whatever the way, the box touches the circle of its radius
    choices = centres[:, None] + steps * (radii[:, None] + extents[:, None] / 2)
    boxes = np.concatenate([choices - extents[:, None] / 2, choices + extents[:, None] / 2], axis=2)
    inside = _overlap(boxes, np.asarray(frame, dtype=np.float64)[None, None])[..., 0]
    outside = extents.prod(axis=1)[:, None] - inside
    fixed = 8 * _overlap(boxes, blocked[None]).sum(axis=-1) + 20 * outside
    fixed += (0.6 * radii / unit + 2.0 * (1 - steps[:, 0])) * unit**2
    chosen = np.argmin(fixed, axis=1)
    for _ in range(SWEEPS):
        for position in range(count):
            others = np.array([boxes[other, chosen[other]] for other in range(count) if other != position])
            common = _overlap(boxes[position], others.reshape(-1, 4))
            met = 12 * common.sum(axis=-1) + TOUCHED * unit**2 * (common > ROUNDING * unit**2).sum(axis=-1)
            chosen[position] = np.argmin(fixed[position] + met)
    return np.asarray(choices[np.arange(count), chosen])


def _overlap(a: Array, b: Array) -> Array:
    """Areas (…, k, l) that rectangles (…, k, 4) and (…, l, 4) have in common."""
    low = np.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = np.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    return np.asarray(np.clip(high - low, 0.0, None).prod(axis=-1))


def label_points(
    axes: Axes,
    names: Sequence[str],
    points: ArrayLike,
    colors: Sequence[str],
    *,
    size: float = SMALL,
    taken: Sequence[Sequence[float]] = (),
) -> None:
    """Write every name beside its point (data coordinates); the figure's layout has to be settled before.

    `taken` are rectangles in pixels that labels leave free if they can.
    """
    if not names:
        return
    figure = figure_of(axes)
    unit = figure.dpi / 72
    drawn = [axes.annotate(name_text(name), (0, 0), fontsize=size, annotation_clip=False) for name in names]
    extents = [text.get_window_extent() for text in drawn]
    sizes = np.array([[box.width + 2 * unit, box.height + 1 * unit] for box in extents])
    for text in drawn:
        text.remove()
    pixels = axes.transData.transform(np.asarray(points, dtype=np.float64))
    centres = place_boxes(pixels, sizes, axes.bbox.extents, taken, unit=unit)
    for name, point, pixel, centre, extent, color in zip(
        names, np.asarray(points, dtype=np.float64), pixels, centres, sizes, colors, strict=True
    ):
        nearest = np.clip(pixel, centre - extent / 2, centre + extent / 2)
        far = float(np.hypot(*(nearest - pixel))) > LEADER * unit
        line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0.0, "shrinkB": 2.5}
        words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": color, "zorder": 5}
        words["path_effects"] = [withStroke(linewidth=2.0, foreground="white")]  # bars behind it do not cross it out
        words |= {"xytext": tuple((centre - pixel) / unit), "textcoords": "offset points"}
        axes.annotate(name_text(name), tuple(point), arrowprops=line if far else None, **words).set_in_layout(False)
