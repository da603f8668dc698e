"""Figures as files. The same figure gives the same bytes."""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from analysis.files import replacing
from analysis.plots.text import figure_of


def to_svg(drawing: Axes | Figure) -> str:
    """The figure as SVG text, the same for the same figure: no date, no random identifiers."""
    figure, buffer = figure_of(drawing), io.StringIO()
    canvas, dpi = figure.canvas, figure.dpi
    backend: Any = FigureCanvasSVG(figure)
    # the backend's own method: `savefig` lays a figure out and draws it twice
    with mpl.rc_context({"svg.hashsalt": "analysis"}):
        try:
            backend.print_svg(buffer, metadata={"Date": None})
        finally:
            figure.set_canvas(canvas)
            figure.dpi = dpi
    return buffer.getvalue()


def to_data_uri(drawing: Axes | Figure) -> str:
    """The figure as the source of an image, inside a page; its layout stays as it was drawn."""
    figure_of(drawing).set_layout_engine("none")  # each drawing function has laid its figure out
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(drawing).encode()).decode()


def save_figure(drawing: Axes | Figure, path: str | Path) -> Path:
    """The path of the figure written as ``.svg`` or ``.pdf`` (text stays text), or ``.png`` at 300 dots per inch.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".pdf", ".png"):
        raise ValueError(f"{path.name}: figures are written as .svg, .pdf or .png")
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[path.suffix]
    with (
        replacing(path) as new,
        mpl.rc_context({"svg.hashsalt": "analysis", "svg.fonttype": "none", "pdf.fonttype": 42}),
    ):
        figure_of(drawing).savefig(new, dpi=300, metadata=metadata)
    return path
