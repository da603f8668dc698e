"""Figures of runs: accuracy matrices, forgetting, capacity."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from analysis.formats import Record, label_records
from analysis.plots import style
from analysis.plots.text import literal, name_text

SHORTER = 24
"""Letters of a task's name that fit beside a row."""
FULLEST: Mapping[str, Any] = {"linewidth": 1.0, "linestyle": (0, (3, 2))}
"""Style of the line of a run's fullest layer."""
Runs = Record | Sequence[Record] | Mapping[str, Record]


@literal
def plot_accuracy_matrix(
    accuracy: ArrayLike,
    names: Sequence[str],
    *,
    zero_shot: ArrayLike | None = None,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Scores (percent) of every task, in columns, after training each task, in rows; NaN stays blank.

    The framed cells on the diagonal were just learned; tasks to their right are unseen. `zero_shot` adds the row
    of the pre-trained model on top. `limits` fix the colour scale, to compare runs.

    Raises:
        ValueError: the matrix is not T × T for T names, or zero_shot not of length T.
    """
    matrix = np.asarray(accuracy, dtype=float)
    count = len(names)
    if matrix.shape != (count, count):
        raise ValueError(f"{count} names need a matrix of shape {(count, count)}, got {matrix.shape}")
    labels = [f"after {name_text(name, SHORTER)}" for name in names]
    values, first = matrix, 0
    if zero_shot is not None:
        row = np.asarray(zero_shot, dtype=float)
        if row.shape != (count,):
            raise ValueError(f"zero_shot has shape {row.shape}, {count} names need {(count,)}")
        values, labels, first = np.vstack([row, matrix]), ["pre-trained", *labels], 1
    norm = Normalize(*(limits or style.color_range(values)))
    axes = style.new_axes(ax, 1.0 + 0.26 * len(labels), style.grid_width(count))
    mesh = style.heat(axes, values, norm, "cividis", form=".1f" if count <= 6 else ".0f")
    if first:
        axes.axhline(1, color="white", linewidth=4)
    for position in np.flatnonzero(~np.isnan(matrix.diagonal())):
        corner = position + 0.04, position + first + 0.04
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=style.PALETTE[1], linewidth=1.6, zorder=3))
    style.label_columns(axes, list(names))
    style.label_rows(axes, labels)
    style.color_bar(mesh, axes, "score (%)")
    return axes


@literal
def plot_forgetting(
    records: Runs,
    *,
    task: str | None = None,
    score: str | None = None,
    palette: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The change of scores along the stream, one line per run.

    Without `task`: the change of score (points) since a task was learned, by the number of tasks learned since. The
    thick line is the mean over tasks, thin lines are single tasks. With `task`: its score (percent) after every task.
    Point 0 is the pre-trained model, and the vertical line marks when the task was learned. Runs in a sequence are
    labelled by their method, or by name where a method occurs twice. `score` defaults to each run's primary score.

    Raises:
        ValueError: the runs have different tasks, or lack the score or the task.
    """
    runs, tasks = _labelled(records)
    if task is not None and task not in tasks:
        raise ValueError(f"no task {task!r}; the tasks are {', '.join(tasks)}")
    axes = style.new_axes(ax, 2.2)
    learned = None if task is None else tasks.index(task) + 1
    for position, (label, run) in enumerate(runs.items()):
        matrix, start = _scores(run, score)
        color, marker = style.style_of(label, position, palette)
        line: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.6}
        if learned is None:
            _since(axes, matrix, label, line)
        else:
            _along(axes, np.vstack([start, matrix])[:, learned - 1], learned, label, line)
    if learned is None:
        axes.axhline(0.0, color=style.FAINT, linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(tasks)))
        style.plain(axes, x="tasks learned since", y="change of score (points)")
    else:
        axes.axvline(learned, color=style.FAINT, linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(tasks) + 1))
        style.plain(axes, x="tasks learned", y=f"score on {name_text(task)} (%)")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    low, high = axes.get_ylim()
    pad = max(0.0, 10.0 - (high - low)) / 2  # at least ten points: small changes should look small
    axes.set_ylim(low - pad, high + pad)
    style.axes_legend(axes, own=ax is None)
    return axes


@literal
def forgetting_panels(
    records: Runs, *, score: str | None = None, palette: Mapping[str, str] | None = None, columns: int = 3
) -> Figure:
    """`plot_forgetting` with one panel per task and one line per run, `columns` panels in a row.

    Raises:
        ValueError: the runs have different tasks, or lack the score.
    """
    runs, tasks = _labelled(records)
    figure, drawn = style.panels(tasks, height=2.0, columns=columns)
    for task, axes in drawn.items():
        plot_forgetting(runs, task=task, score=score, palette=palette, ax=axes)
    style.share_names(figure, drawn, list(runs), x="tasks learned", y="score on this task (%)")
    return figure


@literal
def plot_capacity(records: Runs, *, palette: Mapping[str, str] | None = None, ax: Axes | None = None) -> Axes:
    """Share of the input directions that are protected after each task: mean over layers, and the fullest one.

    Raises:
        ValueError: the runs have different tasks, or none of them has a memory.
    """
    runs, tasks = _labelled(records)
    axes = style.new_axes(ax, 2.2)
    for position, (label, run) in enumerate(runs.items()):
        if rows := [row for row in run.capacity if "mean_fraction" in row]:
            color, marker = style.style_of(label, position, palette)
            mean, most = ([row.get(key, np.nan) for row in rows] for key in ("mean_fraction", "max_fraction"))
            line: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.6}
            axes.plot(range(len(rows)), mean, label=name_text(label), **line)
            axes.plot(range(len(rows)), most, color=color, **FULLEST)
    if not axes.lines:
        raise ValueError("no run has a memory: there is no capacity to draw")
    axes.set_ylim(0.0, 1.02)
    style.label_columns(axes, tasks, offset=0.0)
    style.plain(axes, y="inputs protected (share)\ndashed: fullest layer")
    style.axes_legend(axes, own=ax is None)
    return axes


def _labelled(records: Runs) -> tuple[Mapping[str, Record], tuple[str, ...]]:
    """Label to run, and the tasks that all runs have."""
    runs = records if isinstance(records, Mapping) else label_records(records)
    return runs, style.same_tasks({label: run.tasks for label, run in runs.items()})


def _scores(run: Record, score: str | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    chosen = score or run.primary
    if chosen not in run.accuracy:
        raise ValueError(f"run {run.name!r} has no score {chosen!r}, only {sorted(run.accuracy)}")
    return run.accuracy[chosen], run.zero_shot.get(chosen, np.full(len(run.tasks), np.nan))


def _since(axes: Axes, matrix: NDArray[np.float64], label: str, line: Mapping[str, Any]) -> None:
    count = len(matrix)
    changes = np.full((count, count), np.nan)  # task, tasks learned since
    for position in range(count):
        changes[position, : count - position] = matrix[position:, position] - matrix[position, position]
        axes.plot(range(count), changes[position], color=line["color"], linewidth=0.6, alpha=0.4, zorder=1)
    known = ~np.isnan(changes).all(axis=0)
    axes.plot(np.flatnonzero(known), np.nanmean(changes[:, known], axis=0), label=name_text(label), **line)


def _along(axes: Axes, curve: NDArray[np.float64], learned: int, label: str, line: Mapping[str, Any]) -> None:
    steps = np.arange(len(curve))
    dashed: dict[str, Any] = {"color": line["color"], "linewidth": 1.0, "linestyle": (0, (3, 2)), "alpha": 0.75}
    axes.plot(steps[: learned + 1], curve[: learned + 1], **dashed)
    axes.plot(steps[learned:], curve[learned:], label=name_text(label), **line)
