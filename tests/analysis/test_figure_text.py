"""Text in figures: as it is in the files, complete, with room for the data."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis import (
    AdapterSet,
    interference_table,
    plot_accuracy_matrix,
    plot_entropy_map,
    plot_interference,
    plot_leakage,
    plot_principal_angles,
    plot_spectra,
    spectra_panels,
)
from analysis.names import visible
from analysis.plots import to_svg
from analysis.plots.text import BAR, LEAST, LONGEST, figure_of, make_room, name_text

pytestmark = pytest.mark.slow
LONG = "n" * 300
TEX = ("price in $ and \\bad{$", "$$", "$x^2$", "\\$5", "50 %", "^a_b")
EYE = torch.eye(6)[:, :2]


def adapters(*tasks: str, layers: tuple[str, ...] = ("q",)) -> AdapterSet:
    draw = torch.Generator().manual_seed(0)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(8, 2, generator=draw), torch.randn(6, 2, generator=draw)

    return AdapterSet.from_factors({task: {layer: pair() for layer in layers} for task in tasks})


def leakage(updates: AdapterSet) -> Any:
    return interference_table(updates, protected=dict.fromkeys(updates.layers, EYE))


DRAWN: Mapping[str, Callable[[str], Axes | Figure]] = {
    "spectra": lambda name: plot_spectra(adapters(name, "b")),
    "panels": lambda name: spectra_panels({name: adapters(name, "b"), "other": adapters(name, "b")}),
    "layers": lambda name: plot_entropy_map(adapters("a", layers=(name, "b"))),
    "map": lambda name: plot_entropy_map(adapters(name, "b", layers=(name, "b")), columns="task"),
    "interference": lambda name: plot_interference(adapters(name, "b")),
    "angles": lambda name: plot_principal_angles(adapters(name, "b")),
    "leakage": lambda name: plot_leakage({name: leakage(adapters(name, "b")), "other": leakage(adapters(name, "b"))}),
    "scores": lambda name: plot_accuracy_matrix(np.eye(2), [name, "b"], zero_shot=[1.0, 2.0]),
}


def words(drawing: Axes | Figure) -> list[str]:
    """Every text of a figure as it will be drawn."""
    figure = drawing.get_figure(root=True)
    assert figure is not None
    return [text._preprocess_math(text.get_text())[0] for text in figure.findobj(Text)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("name", [*TEX, "a\x1b[31mb", "two\nlines", "_hidden"])
def test_names_are_drawn_as_they_are(draw: Callable[[str], Axes | Figure], name: str) -> None:
    drawing = draw(name)
    assert any(visible(name) in text for text in words(drawing))
    figure = drawing.get_figure(root=True)
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if visible(name) in text.get_text())  # type: ignore[union-attr,attr-defined]


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_long_names_leave_room_for_the_data(draw: Callable[[str], Axes | Figure]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where text leaves no room
        drawing = draw(LONG)
        to_svg(drawing)
    figure = drawing.get_figure(root=True)
    assert figure is not None
    assert max(len(line) for text in words(drawing) for line in text.split("\n")) <= 2 * LONGEST + 8
    for axes in figure.axes:
        if axes.get_visible() and axes.get_label() != BAR:
            size = axes.bbox.size / figure.dpi
            assert (size >= 0.6 * np.array(LEAST)).all()  # names aslant: each layout gives them another place


@pytest.mark.parametrize(
    "metric", ["alignment", "input_overlap", "output_overlap", "backward", "forward_corruption", "forward_subspace"]
)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_name_of_a_colour_bar_fits_beside_it(metric: str, count: int) -> None:
    axes = plot_interference(adapters(*"abcdefg"[:count]), metric=metric)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    (bar,) = [each for each in figure.axes if each.get_label() == BAR]
    label = bar.yaxis.label.get_window_extent()
    assert figure.bbox.y0 <= label.y0 < label.y1 <= figure.bbox.y1
    assert label.x1 <= figure.bbox.x1 + 1  # pixel


def test_a_users_own_axes_keep_their_size_and_their_formulas() -> None:
    figure = Figure(figsize=(2.0, 1.0))
    axes = figure.subplots()
    axes.set_title("$x^2$")
    plot_spectra(adapters("$y$", "b"), ax=axes)
    assert tuple(figure.get_size_inches()) == (2.0, 1.0)
    assert axes.title.get_parse_math()
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_parse_math() for text in legend.get_texts()] == [False, False]


def test_names_are_shortened_in_the_middle_and_quoted_where_a_legend_would_lose_them() -> None:
    assert name_text("model.layers.11.self_attn.q_proj", 12) == "model.…_proj"
    assert name_text("a" * LONGEST) == "a" * LONGEST
    assert [name_text(name) for name in ("", " ", "_x", "x_")] == ['""', '" "', '"_x"', "x_"]


@pytest.mark.parametrize("kind", ["map", "panels", "interference"])
def test_axes_and_bars_are_placed_as_a_drawing_places_them_and_nothing_is_drawn(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figure_of(DRAWN[kind]("a"))
    figure.set_size_inches(9.0, 5.0)  # ample: one layout is enough
    with monkeypatch.context() as patch:
        patch.setattr(Axes, "draw", lambda *_: pytest.fail("drawn"))
        make_room(figure)
    placed = [axes.bbox.extents.copy() for axes in figure.axes]
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
    assert all(np.array_equal(axes.bbox.extents, at) for axes, at in zip(figure.axes, placed, strict=True))
