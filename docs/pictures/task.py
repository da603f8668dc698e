"""Picture C: the life of one task, and how to read a matrix of scores."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import FREE, INK, LINE, NEW, OLD, SOFT, TEXT, card

from analysis import Record
from manifold_cl.continual.metrics import bwt, fwt, mfn, mft

CELLS = Path(__file__).parents[2] / "benchmarks" / "results" / "text-six" / "cells"
STAGES = (
    ("start", "A sketch of the task's gradient\ngives the first U and V. V avoids F.", SOFT),
    ("train", "U, V and s are trained. F stays as it is:\nΔW F = 0 after every step.", NEW),
    ("merge", "W becomes W + ΔW.\nThere is one model again.", NEW),
    ("measure", "A pass over data finds the input\ndirections that the task uses.", OLD),
    ("grow memory", "F gains these directions. Protected after\ntasks 1 to {count}: {shares} %.", OLD),
)


def draw() -> Figure:
    """The picture, from two records of the committed study."""
    figure = card(8.9)
    protecting, plain = (Record.load(CELLS / f"{method}-seed0") for method in ("eblora", "sequential_merge"))
    _title(figure, 0.967, "the life of one task")
    space = figure.add_axes((0.03, 0.56, 0.94, 0.39))
    _life(space, [100 * row["mean_fraction"] for row in protecting.capacity])
    _title(figure, 0.535, "how to read a matrix of scores")
    caption = "plain LoRA, merged after each task; scores in percent"
    figure.text(0.5, 0.508, caption, ha="center", va="center", fontsize=TEXT, color=SOFT)
    _matrix(figure.add_axes((0.255, 0.195, 0.66, 0.24)), plain)
    _key(figure, plain.matrix)
    return figure


def _title(figure: Figure, height: float, words: str) -> None:
    figure.text(0.5, height, words, ha="center", va="center", fontsize=TEXT + 1.5, color=INK, weight="bold")


def _life(axes: Axes, shares: list[float]) -> None:
    """One row per stage, and an arrow from the last one back to the first."""
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(len(STAGES) - 0.5, -0.5))
    percent = ", ".join(f"{share:.0f}" for share in shares)
    text = {"va": "center", "fontsize": TEXT}
    for row, (name, words, color) in enumerate(STAGES):
        box = FancyBboxPatch((0.8, row - 0.27), 2.4, 0.54, boxstyle="round,pad=0,rounding_size=0.15")
        box.set(facecolor=color, edgecolor="none", mutation_aspect=0.5)
        axes.add_patch(box)
        axes.text(2.0, row, name, ha="center", color="white", weight="bold", **text)
        words = words.format(count=len(shares), shares=percent)
        axes.text(3.42, row, words, color=INK, linespacing=1.3, **text)
        if row + 1 < len(STAGES):
            axes.add_patch(FancyArrowPatch((2.0, row + 0.27), (2.0, row + 0.74), **_line(INK)))
    last = len(STAGES) - 1
    axes.plot([0.8, 0.5, 0.5], [last, last, 0], color=SOFT, linewidth=1.5)
    axes.add_patch(FancyArrowPatch((0.485, 0), (0.8, 0), **_line(SOFT)))
    axes.text(0.22, last / 2, "next task", rotation=90, ha="center", color=SOFT, **text)


def _line(color: str) -> dict[str, object]:
    return {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.5, "color": color, "shrinkA": 0, "shrinkB": 0}


def _matrix(axes: Axes, run: Record) -> None:
    """The scores; the diagonal and the last row are framed, tasks that are not learned yet are green."""
    count = len(run.tasks)
    for row, column in np.ndindex(count, count):
        shade = FREE if column > row else "white"
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=shade, alpha=0.16, edgecolor="none"))
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor="none", edgecolor=LINE, linewidth=0.6))
        words = f"{run.matrix[row, column]:.0f}"
        axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", fontsize=TEXT, color=INK)
    for step in range(count):
        axes.add_patch(Rectangle((step + 0.07, step + 0.1), 0.86, 0.8, fill=False, edgecolor=NEW, linewidth=1.8))
    axes.add_patch(Rectangle((0, count - 1), count, 1, fill=False, edgecolor=OLD, linewidth=2.4, clip_on=False))
    axes.set(xlim=(0, count), ylim=(count, 0))
    axes.spines[:].set_visible(False)
    axes.set_yticks(np.arange(count) + 0.5, [f"after {task}" for task in run.tasks], fontsize=TEXT - 0.5)
    axes.set_xticks(
        np.arange(count) + 0.5, run.tasks, fontsize=TEXT - 0.5, rotation=30, ha="left", rotation_mode="anchor"
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=INK)


def _key(figure: Figure, matrix: np.ndarray) -> None:
    lines = (
        (NEW, "MFT", mft(matrix), "mean of the diagonal: just learned"),
        (OLD, "MFN", mfn(matrix), "mean of the last row: at the end"),
        (INK, "BWT", bwt(matrix), f"last row minus diagonal, first {len(matrix) - 1} tasks"),
        (FREE, "FWT", fwt(matrix), "mean over the green columns: not learned yet"),
    )
    for row, (color, name, value, words) in enumerate(lines):
        height = 0.155 - 0.035 * row
        look = {"va": "center", "fontsize": TEXT, "color": color}
        figure.text(0.06, height, name, weight="bold", **look)
        figure.text(0.24, height, f"{value:.1f}".replace("-", "−"), ha="right", weight="bold", **look)
        figure.text(0.265, height, words, **{**look, "color": INK})
