"""Text in figures: literal, never TeX, in figures large enough for it."""

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from textwrap import fill
from typing import ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.names import visible

LONGEST = 30
"""Letters of a name that a figure shows; the middle of a longer one is left out."""
LEAST = (1.2, 0.7)
"""Smallest width and height of axes in inches: a figure grows until they fit beside its text."""
GROWTH = (0.6, 0.4)
"""Inches by which a figure grows per step."""
TRIES = 12
LINES = 1.6
"""Longest name beside an axis, relative to the axis, that fits on two lines."""
BAR = "<colorbar>"
"""Matplotlib's label of the axes of a colour bar."""

P = ParamSpec("P")
Drawing = TypeVar("Drawing", Axes, Figure)


def literal(draw: Callable[P, Drawing]) -> Callable[P, Drawing]:
    """Decorates a drawing function: its text is literal, and a new figure grows until text and data fit.

    Dollar signs in names do not start a formula.
    """

    @wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Drawing:
        with mpl.rc_context({"text.parse_math": False, "text.usetex": False}):
            drawing = draw(*args, **options)
            _take_literally([drawing] if isinstance(drawing, Axes) else figure_of(drawing).axes)
            if options.get("ax") is None:
                make_room(figure_of(drawing))
        return drawing

    return drawn


def _take_literally(panels: Sequence[Axes]) -> None:
    """Turn off formulas in the names of axes and ticks, also where they are older than the drawing."""
    for axes in panels:
        for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set(parse_math=False, usetex=False)


def figure_of(drawing: Axes | Figure) -> Figure:
    """The figure itself, or that of the axes."""
    figure = drawing.get_figure(root=True)
    assert isinstance(figure, Figure)  # axes live in one
    return figure


def make_room(figure: Figure) -> None:
    """Lay a figure out, enlarge it until its axes fit beside the text, and wrap long names of colour bars."""
    fits = 0
    for _ in range(TRIES):
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            _place_axes(figure)
        collapsed = any("collapsed" in str(one.message) for one in messages)
        sizes = [
            np.asarray(axes.bbox.size) / figure.dpi
            for axes in figure.axes
            if axes.get_visible() and axes.get_label() != BAR
        ]
        short = [collapsed or any(size[side] < LEAST[side] for size in sizes) for side in (0, 1)]
        short[1] |= any(_length(axes) > LINES * _room(axes) for axes in figure.axes)
        fits = 0 if any(short) else fits + 1
        ample = all(size[side] > 1.5 * LEAST[side] for size in sizes for side in (0, 1))
        if fits == 2 or (fits and ample):  # a second layout may leave less room than the first
            break
        figure.set_size_inches(*(figure.get_size_inches() + np.array(GROWTH) * short))
    for axes in figure.axes:
        if _length(axes) > _room(axes):
            text = axes.get_ylabel()
            axes.set_ylabel(fill(text, int(len(text) * _room(axes) / _length(axes)) + 1))


def _place_axes(figure: Figure) -> None:
    """Place the axes beside their text as a drawing does, in half the time: nothing inside them is drawn."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
    for axes in figure.axes:  # each drawing ends with the aspects: those of colour bars are fixed
        locator = axes.get_axes_locator()
        axes.apply_aspect(None if locator is None else locator(axes, None))  # type: ignore[arg-type]  # as matplotlib


def _length(axes: Axes) -> float:
    """Length of the name of the ordinate, in pixels."""
    return float(axes.yaxis.label.get_window_extent().height)


def _room(axes: Axes) -> float:
    """The space for that name: the length of a colour bar, else the figure's height."""
    return float(axes.bbox.height if axes.get_label() == BAR else figure_of(axes).bbox.height)


def name_text(name: object, longest: int = LONGEST) -> str:
    """A name for a figure: control characters as escapes, the middle of a long one left out.

    A name that is empty or starts with an underscore stands in quotes: matplotlib leaves such labels out of legends.

    >>> name_text("a" * 20 + "b" * 20), name_text("_x")
    ('aaaaaaaaaaaaaaa…bbbbbbbbbbbbbb', '"_x"')
    """
    text = visible(name)
    if len(text) > longest:
        tail = (longest - 1) // 2
        text = f"{text[: longest - 1 - tail]}…{text[-tail:]}"
    return f'"{text}"' if not text.strip() or text.startswith("_") else text
