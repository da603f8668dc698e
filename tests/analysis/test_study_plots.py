"""Figures of a study: the numbers are where they belong, and names do not cover each other."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from analysis import StudyResults, plot_study, plot_trade_off
from analysis.plots import PALETTE, plot_change, plot_cost, plot_differences, to_svg
from analysis.plots.labels import label_points, place_boxes

LEARNED = {"plain": (70.0, 20.0), "ours": (69.0, 1.0), "third": (71.0, 8.0), "late": (66.0, 4.0)}
"""Label to mean fresh accuracy and how much every earlier task loses."""
STORED = {
    "plain": {"updates": 3e6, "state": 0, "old_examples": 0},
    "ours": {"updates": 3e6, "state": 1.5e6, "old_examples": 0},
    "third": {"updates": 8e6, "state": 0, "old_examples": 7},
    "late": {"updates": 3e6, "state": 2e6, "old_examples": 0},
    "zero_shot": {"updates": 0, "state": 0, "old_examples": 0},
    "joint": {"updates": 1e6, "state": 0, "old_examples": 120},
}


def run(fresh: float, loss: float, seed: int) -> list[list[float]]:
    a = fresh + seed
    return [[a, 40, 30], [a - loss, a, 30], [a - loss, a - loss, a]]


@pytest.fixture
def study(tmp_path: Path, write_study: Callable[..., Path]) -> StudyResults:
    runs = {label: [run(*numbers, seed) for seed in range(3)] for label, numbers in LEARNED.items()}
    runs |= {"zero_shot": [run(40, 0, 0)] * 3, "joint": [run(73, 0, seed) for seed in range(3)]}
    return StudyResults.load(write_study(tmp_path / "study", runs, stored=STORED))


def names(axes: Axes) -> dict[str, Annotation]:
    return {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}


def markers(axes: Axes) -> dict[tuple[float, float], str]:
    return {
        (round(float(line.get_xdata()[0]), 6), round(float(line.get_ydata()[0]), 6)): str(line.get_marker())
        for line in axes.get_lines()
        if line.get_marker() != "None"
    }


def test_methods_are_points_and_the_bounds_are_lines(study: StudyResults) -> None:
    axes = plot_trade_off(study, highlight=["ours"])
    assert markers(axes) == {  # MFT of the middle seed; MFN is two thirds of the loss below
        (71.0, round(71 - 40 / 3, 6)): "s",  # the reference
        (70.0, round(70 - 2 / 3, 6)): "D",
        (72.0, round(72 - 16 / 3, 6)): "^",  # keeps old data
        (67.0, round(67 - 8 / 3, 6)): "o",
    }
    assert {"plain", "ours", "third", "late", "zero-shot 40.0", "joint 74.0", "no forgetting"} == set(names(axes))
    assert names(axes)["ours"].get_color() == PALETTE[1]
    lines = [line for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]
    flat = [line.get_ydata()[0] for line in lines if np.ptp(np.asarray(line.get_ydata())) == 0]  # not the diagonal
    assert flat == pytest.approx([40.0, 74.0], rel=1e-12)  # float64


@pytest.mark.parametrize(
    "fresh", [(60, 90), (60, 88, 90), (60, 70, 90), (60, 62, 65, 85, 88, 90), (60, 61, 62, 63, 90)]
)
@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_the_name_of_the_diagonal_stays_off_points_and_bars(
    fresh: tuple[float, ...], spread: float, tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    """All methods lie on it, some at its upper end, where the name stands if nothing else is near."""
    runs = {f"m{level}": [run(level, 0, spread * seed) for seed in range(2)] for level in fresh}
    axes = plot_trade_off(StudyResults.load(write_study(tmp_path, runs)))
    text = names(axes)["no forgetting"]
    slanted, turn = text.get_window_extent(), np.deg2rad(text.get_rotation())
    centre = np.array([(slanted.x0 + slanted.x1) / 2, (slanted.y0 + slanted.y1) / 2])
    along, across = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    text.set_rotation(0)
    half = np.array(text.get_window_extent().size) / 2
    for line in axes.get_lines()[:-1]:  # all but the diagonal itself
        ends = axes.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
        size = line.get_linewidth() if line.get_marker() == "None" else line.get_markersize()
        for share in np.linspace(0, 1, 50):
            away = ends[0] + share * (ends[-1] - ends[0]) - centre
            outside = np.clip(np.abs([away @ along, away @ across]) - half, 0, None)
            assert np.hypot(*outside) > size / 2 * axes.figure.dpi / 72


def test_bars_are_the_intervals_of_the_summary(study: StudyResults) -> None:
    axes = plot_change(study)
    reach = 4.302653 / 3**0.5  # Student's quantile for two degrees of freedom; MFT of three seeds has sd 1
    bars = [line for line in plot_trade_off(study).get_lines() if line.get_marker() == "None"]
    wide = [line.get_xdata() for line in bars if np.ptp(np.asarray(line.get_xdata())) > 1.5]
    assert [pytest.approx((71 - reach, 71 + reach), rel=1e-6)] == [tuple(wide[0])]  # the quantile's six decimals
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "zero_shot",
        "joint",
        "ours",
        "late",
        "third",
        "plain",
    ]
    assert axes.get_ylim() == (5.5, -0.5)  # the best on top
    said = " ".join(axes.get_xlabel().split())
    assert said.endswith("bars: 95 % intervals of the mean over 3 seeds, same tasks and test texts")
    assert sorted(x for x, _ in markers(axes)) == [-20.0, -8.0, -4.0, -1.0, 0.0, 0.0]


def test_cost_shows_what_was_recorded(study: StudyResults, tmp_path: Path, write_study: Callable[..., Path]) -> None:
    minutes, stored = plot_cost(study).axes
    assert {round(x, 6) for x, _ in markers(minutes)} == {round(3 * 3.5 / 60, 6)}
    assert {x for x, _ in markers(stored)} == {3.0, 4.5, 8.0, 5.0, 0.0, 1.0}
    older = StudyResults.load(write_study(tmp_path / "older", {"plain": [run(70, 5, 0)]}))
    assert [axes.get_xlabel() for axes in plot_cost(older).axes] == ["learning (minutes)"]
    assert len(plot_study(older).axes) == 3  # nothing is known of what is stored


def test_the_wide_figure_has_a_row_a_method_in_every_panel(study: StudyResults) -> None:
    figure = plot_study(study, highlight=["ours"])
    assert tuple(figure.get_size_inches()) == (12.0, 4.2)
    first, change, minutes, stored = figure.axes
    assert first.get_ylabel() == "MFN: at the end (%)"
    assert len(change.get_yticklabels()) == 6
    assert [text.get_text() for text in stored.texts] == ["0", "1.0 + data", "4.5", "5.0", "8.0 + data", "3.0"]
    widths = [bar.get_width() for bar in stored.patches]
    assert widths[4:6] == [3.0, 1.5]  # ours: updates, then state
    assert len(minutes.patches) == 6
    smallest = min(text.get_fontsize() for axes in figure.axes for text in [*axes.texts, *axes.get_yticklabels()])
    assert smallest * 900 / (12 * 72) >= 9  # pixels of text where a page shows the figure 900 pixels wide


@pytest.mark.slow
def test_nothing_global_changes_and_the_same_study_gives_the_same_bytes(study: StudyResults) -> None:
    before = dict(mpl.rcParams)
    assert to_svg(plot_study(study)) == to_svg(plot_study(study))
    assert dict(mpl.rcParams) == before
    axes = Figure(layout="constrained").subplots()
    assert plot_trade_off(study, ax=axes) is axes


def test_one_seed_is_drawn_without_bars(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    study = StudyResults.load(write_study(tmp_path, {"plain": [run(70, 20, 0)], "ours": [run(69, 1, 0)]}))
    axes = plot_trade_off(study)
    assert len(axes.get_lines()) == 2 + 1  # two points and the diagonal
    assert axes.get_xlabel() == "MFT: just learned (%)"  # and nothing is said of bars
    assert to_svg(plot_study(study)).startswith("<?xml")


def test_wide_intervals_do_not_stretch_any_axis(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    """Two seeds have intervals of 12.7 standard errors: ends far outside of all means are cut."""
    runs = {f"m{level}": [run(level, 2, 0), run(level + 2, 2, 0)] for level in (60, 61, 62)}
    stored = {label: {"updates": 3e6, "state": 0, "old_examples": 0} for label in runs}
    study = StudyResults.load(write_study(tmp_path, runs, stored=stored))
    assert study.summary().query("figure == 'mfn'")["high"].max() > 70  # percent
    figures = [plot_trade_off(study).get_figure(), plot_change(study).get_figure(), plot_cost(study), plot_study(study)]
    for axes in (axes for figure in figures if isinstance(figure, Figure) for axes in figure.axes):
        if axes.get_ylabel().startswith("MFN"):
            assert np.ptp(axes.get_ylim()) < 6


def test_the_legend_of_the_study_explains_pale_bars_and_intervals(study: StudyResults) -> None:
    for narrow in (False, True):
        (legend,) = plot_study(study, narrow=narrow).legends
        words = [" ".join(text.get_text().split()) for text in legend.get_texts()]
        assert words[:2] == ["stored: updates", "state kept for the next task"]
        assert words[2].startswith("95 % intervals of the mean over 3 seeds")
        alphas = [handle.get_alpha() for handle in legend.get_patches()]
        assert alphas[1] < alphas[0] / 2


def test_the_narrow_figure_is_legible_on_a_telephone(study: StudyResults) -> None:
    figure = plot_study(study, narrow=True)
    width = figure.get_figwidth()
    smallest = min(text.get_fontsize() for axes in figure.axes for text in [*axes.texts, *axes.get_yticklabels()])
    assert smallest * 390 / (72 * width) >= 8  # pixels of text where a page is 420 pixels wide
    first, change, minutes, stored = figure.axes
    figure.draw_without_rendering()
    assert first.bbox.y0 > change.bbox.y1
    assert minutes.bbox.y0 == pytest.approx(stored.bbox.y0)


def test_what_is_not_on_record_is_not_drawn(
    tmp_path: Path, write_study: Callable[..., Path], record: dict[str, object]
) -> None:
    record["timings"] = []
    study = StudyResults.load(write_study(tmp_path, {"zero_shot": [run(40, 0, 0)]}))
    assert [text.get_text() for text in plot_cost(study).axes[0].texts] == ["no record says what it cost"]
    first, _, minutes = plot_study(study).axes
    assert markers(first) == {}  # the pre-trained model is a line
    assert [text.get_text() for text in minutes.texts] == ["–"]


def test_nothing_to_draw_and_unknown_labels_are_errors(
    study: StudyResults, tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match="no complete cell has the label 'theirs'; there are plain, ours"):
        plot_study(study, highlight=["theirs"])
    with pytest.raises(ValueError, match="no cell of the study 'small' is complete: there is nothing to draw yet"):
        plot_trade_off(StudyResults.load(write_study(tmp_path / "new", {"plain": [None]})))


@given(st.integers(0, 10_000), st.integers(1, 16))
@example(1821, 13)  # a sliver of 0.07 square points that cost less than another place
@settings(max_examples=25, deadline=None)
def test_boxes_that_have_room_do_not_overlap(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    points = draw.uniform((60, 60), (440, 340), (count, 2))
    sizes = np.stack([draw.uniform(30, 90, count), np.full(count, 11.0)], axis=1)
    centres = place_boxes(points, sizes, (0, 0, 500, 400))
    low, high = centres - sizes / 2, centres + sizes / 2
    for a, b in combinations(range(count), 2):
        common = np.clip(np.minimum(high[a], high[b]) - np.maximum(low[a], low[b]), 0, None).prod()
        assert common <= 1e-6  # rounding: sides that touch
    assert (low >= 0).all()
    assert (high <= (500, 400)).all()


def test_the_names_of_fourteen_close_methods_do_not_cover_each_other() -> None:
    figure = Figure(figsize=(4.6, 3.6))
    axes = figure.subplots()
    axes.set(xlim=(60, 80), ylim=(50, 80))
    draw = np.random.default_rng(3)
    points = np.concatenate([draw.normal((74, 73), (0.7, 1.0), (8, 2)), draw.normal((74, 60), (0.5, 1.5), (6, 2))])
    label_points(axes, [f"method_{place:02d}" for place in range(14)], points, ["black"] * 14)
    figure.draw_without_rendering()
    drawn = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own would count its line
    assert len(drawn) == 14
    for a, b in combinations(drawn, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(across, along) <= 1.0  # half a pixel each way is rounded away
    assert any(text.arrow_patch is not None for text in axes.texts if isinstance(text, Annotation))  # far ones are led


def test_the_forest_plot_has_a_row_per_method_with_its_interval(study: StudyResults) -> None:
    axes = plot_differences(study)
    table = study.paired(figures=["mfn"]).sort_values("difference", ascending=False)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(table["label"])
    centres = [float(np.atleast_1d(line.get_xdata())[0]) for line in axes.lines if np.size(line.get_xdata()) == 1]
    assert centres == pytest.approx(list(table["difference"]))
    bars = np.array(
        [line.get_xdata() for line in axes.lines if np.size(line.get_xdata()) == 2][1:]
    )  # after that of zero
    np.testing.assert_allclose(bars, table[["low", "high"]].dropna())
    shown = [text.get_text() for text in axes.texts]
    assert shown == [*("–" if np.isnan(p) else f"{p:.3f}" for p in table["p_holm"]), "p, Holm"]


def test_a_study_of_the_reference_alone_has_nothing_to_compare(
    tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    alone = StudyResults.load(write_study(tmp_path / "alone", {"plain": [run(70, 20, 0)]}))
    with pytest.raises(ValueError, match="nothing to compare"):
        plot_differences(alone)
