"""The check of layouts finds every kind of fault, and none in a plain figure."""

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from figure_layout import faults
from matplotlib.figure import Figure


def plain() -> Figure:
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1, 2], [0, 1, 2], color="blue", marker="o", label="first")
    axes.plot([0, 1, 2], [2, 1, 0], color="blue", marker="s", label="second")
    axes.set_xticks([0, 1, 2], ["a slanted name", "another one", "the last one"], rotation=40, ha="right")
    figure.legend(loc="outside upper left")
    return figure


def cut(figure: Figure) -> None:
    figure.axes[0].text(1.0, 1.0, "far outside", transform=figure.transFigure)


def overlap(figure: Figure) -> None:
    figure.axes[0].text(0.2, 1.7, "one name")
    figure.axes[0].text(0.3, 1.7, "another name")


def covered(figure: Figure) -> None:
    figure.axes[0].legend(loc="center")


def alike(figure: Figure) -> None:
    figure.axes[0].plot([0, 1], [1, 1], color="blue", marker="o", label="third")


def points_alike(figure: Figure) -> None:
    for name in ("fourth", "fifth"):
        figure.axes[0].scatter([0.1], [0.1], color="red", marker="s", label=name)


def bars_covered(figure: Figure) -> None:
    figure.axes[0].clear()
    figure.axes[0].barh(range(3), [1, 1, 1], label="bars")
    figure.axes[0].legend(loc="center")


def test_a_plain_figure_has_no_faults() -> None:
    assert faults(plain()) == []


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (cut, "cut by the canvas: 'far outside'"),
        (overlap, "overlap: 'one name' and 'another name'"),
        (covered, "legend over data: 'first, second' covers"),
        (alike, "one look for two curves: 'first' and 'third'"),
        (points_alike, "one look for two curves: 'fourth' and 'fifth'"),
        (bars_covered, "legend over data: 'bars' covers"),
    ],
)
def test_every_kind_of_fault_is_named(spoil: Callable[[Figure], None], fault: str) -> None:
    figure = plain()
    spoil(figure)
    assert [one for one in faults(figure) if one.startswith(fault)] != []


def test_slanted_names_overlap_only_where_their_rectangles_do() -> None:
    """Their upright boxes overlap in both cases."""
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    for shift in (0.0, 0.2):
        axes.text(0.3 + shift, 0.3, "a long slanted name", rotation=45, rotation_mode="anchor")
    assert faults(figure) == []
    axes.texts[1].set_position((0.32, 0.3))
    assert len(faults(figure)) == 1


def test_what_is_not_drawn_does_not_count() -> None:
    figure = plain()
    axes = figure.axes[0]
    axes.set_xticks(np.arange(60), [f"tick {k}" for k in range(60)])
    axes.set_xlim(0, 2)
    axes.text(0.2, 1.7, "one name").set_visible(False)
    axes.text(0.3, 1.7, "another name")
    assert faults(figure) == []


def test_figures_are_blank_until_the_file_ends_and_no_longer():
    """A fixture of the session would blank the figures of every file that runs later in the same process."""
    fixtures = {}
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.decorator_list and "figures(drawn=" in ast.unparse(node.body):
                fixtures[f"{path.parent.name}/{path.name}"] = " ".join(map(ast.unparse, node.decorator_list))
    assert len(fixtures) >= 4
    assert {name: text for name, text in fixtures.items() if "session" in text or "package" in text} == {}
