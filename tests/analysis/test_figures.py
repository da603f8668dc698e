import dataclasses
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import stats

from analysis import (
    AdapterSet,
    Record,
    forgetting_panels,
    interference_table,
    plot_accuracy_matrix,
    plot_entropy_map,
    plot_forgetting,
    plot_imbalance,
    plot_interference,
    plot_leakage,
    plot_principal_angles,
    plot_spectra,
    save_figure,
    singular_values,
    spectra_panels,
    spectrum_table,
)
from analysis.plots import PALETTE, plot_capacity, to_svg
from analysis.plots.style import style_of


@pytest.fixture
def run(tmp_path: Path, write_run: Callable[..., Path]) -> Path:
    return write_run(tmp_path / "run")


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def cells(axes: Axes) -> np.ma.MaskedArray:
    return np.ma.masked_invalid(axes.collections[0].get_array())


def test_flat_spectra_lie_on_one_and_steep_ones_where_they_should() -> None:
    eye = torch.eye(6)[:, :3]
    flat = AdapterSet.from_factors({"a": {"x": (7 * eye, eye)}})
    steep = AdapterSet.from_factors({"a": {"x": (eye * torch.tensor([2.0, 1.0, 1.0]), eye)}})
    axes = spectra_panels({"flat": flat, "steep": steep}).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(lines["flat"].get_ydata(), [1, 1, 1], rtol=1e-12)
    # norm² = 6, flat value √2
    np.testing.assert_allclose(lines["steep"].get_ydata(), np.array([2, 1, 1]) / np.sqrt(2), rtol=1e-12)
    assert axes.get_title(loc="left") == "1  a"
    assert [lines[name].get_color() for name in lines if name in ("flat", "steep")] == list(PALETTE[:2])


def test_every_set_of_a_panel_lies_within_its_scale() -> None:
    """The scale of the first set did not hold the steeper second one."""
    eye = torch.eye(6)[:, :3]
    sets = {"flat": eye, "steep": eye * torch.tensor([1.0, 1e-2, 1e-4])}
    axes = spectra_panels({k: AdapterSet.from_factors({"a": {"x": (v, eye)}}) for k, v in sets.items()}).axes[0]
    low, high = axes.get_ylim()
    for line in axes.get_lines():
        assert low <= np.min(line.get_ydata()) <= np.max(line.get_ydata()) <= high


def test_a_hundred_lines_have_looks_of_their_own() -> None:
    looks = [style_of("", place) for place in range(100)]
    assert len(set(looks)) == 100
    palette = {str(place): PALETTE[place % len(PALETTE)] for place in range(100)}  # as a report makes it
    assert [style_of(label, 0, palette) for label in palette] == looks


def test_condition_numbers_have_a_scale_of_powers() -> None:
    eye = torch.eye(6, dtype=torch.float64)[:, :2]
    pairs = {name: (eye * torch.tensor([1.0, low]), eye) for name, low in (("h.0.q", 0.5), ("h.1.q", 1e-9))}
    axes = plot_entropy_map(AdapterSet.from_factors({"a": pairs}), metric="condition")
    assert isinstance(axes.collections[0].norm, LogNorm)
    assert axes.collections[0].get_clim() == pytest.approx((2.0, 1e9), rel=1e-6)


def test_an_infinite_ratio_does_not_set_the_scale(run: Path) -> None:
    table = interference_table(AdapterSet.load(run))
    chosen = (table["metric"] == "backward") & (table["layer"] == "total")
    table.loc[table[chosen].index[0], "value"] = np.inf
    low, high = plot_interference(table, metric="backward").collections[0].get_clim()
    assert 0 <= low < high < 2


def test_spectra_have_a_panel_a_task(run: Path) -> None:
    figure = spectra_panels(AdapterSet.load(run), update="accumulated", palette={"": "#123456"})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1  news", "2  nouns", "3  films"]
    widths = [len(axes.get_lines()[0].get_xdata()) for axes in figure.axes]
    assert widths == [3, 6, 9]  # stacked ranks
    assert figure.axes[0].get_lines()[0].get_color() == "#123456"
    with pytest.raises(ValueError, match="update is 'both', choose 'task' or 'accumulated'"):
        spectra_panels(AdapterSet.load(run), update="both")


def test_different_streams_do_not_share_panels(run: Path) -> None:
    whole, part = AdapterSet.load(run), AdapterSet.load(run / "tasks" / "01-news")
    with pytest.raises(ValueError, match="'a' and 'b' have different tasks: news, nouns, films; news"):
        spectra_panels({"a": whole, "b": part})
    with pytest.raises(ValueError, match="nothing to plot"):
        spectra_panels({})


def test_the_entropy_map_shows_the_numbers_of_the_table(run: Path) -> None:
    adapters = AdapterSet.load(run)
    table = spectrum_table(adapters)
    axes = plot_entropy_map(table, update="accumulated", columns="task")
    chosen = table[(table["metric"] == "entropy_energy_normalized") & (table["update"] == "accumulated")]
    for row, layer in enumerate(adapters.layers):
        expected = chosen[chosen["layer"] == layer]["value"].to_numpy()
        np.testing.assert_allclose(cells(axes).reshape(3, 3)[row], expected, rtol=1e-12)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.mlp", "0.query", "10.query"]
    assert axes.get_ylim() == (3, 0)  # first layer on top
    with pytest.raises(ValueError, match="no metric 'colour' of 'task' updates; there are"):
        plot_entropy_map(table, metric="colour")


def test_interference_is_symmetric_with_a_blank_diagonal(run: Path) -> None:
    adapters = AdapterSet.load(run)
    table = interference_table(adapters)
    axes = plot_interference(adapters, metric="alignment", layer="model.layer.0.mlp")
    grid = cells(axes).reshape(3, 3)
    assert grid.mask.diagonal().all()
    chosen = table[(table["metric"] == "alignment") & (table["layer"] == "model.layer.0.mlp")]
    np.testing.assert_allclose(grid[[1, 2, 2], [0, 0, 1]], chosen["value"], rtol=1e-12)
    np.testing.assert_array_equal(grid[[0, 0, 1], [1, 2, 2]], grid[[1, 2, 2], [0, 0, 1]])
    low, high = axes.collections[0].get_clim()
    assert low == -high


def test_overlap_marks_chance_and_leakage_is_one_column(run: Path) -> None:
    table = interference_table(AdapterSet.load(run))
    overlap = plot_interference(table, metric="input_overlap")
    assert any(
        label.get_text() == "chance 0.3" for label in overlap.get_figure().axes[1].get_yticklabels()
    )  # r / n = 3 / 10
    leakage = plot_interference(table, metric="leakage")
    assert cells(leakage).reshape(2, 1).shape == (2, 1)
    assert [label.get_text() for label in leakage.get_yticklabels()] == ["nouns", "films"]
    with pytest.raises(ValueError, match="no 'alignment' of layer 'nowhere'; the metrics are"):
        plot_interference(table, layer="nowhere")


def test_the_accuracy_matrix_has_a_pre_trained_row_and_blanks() -> None:
    axes = plot_accuracy_matrix([[70, 41], [65, np.nan]], ["a", "b"], zero_shot=[50, 40])
    assert texts(axes) == ["50.0", "40.0", "70.0", "41.0", "65.0"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["pre-trained", "after a", "after b"]
    with pytest.raises(ValueError, match=r"2 names need a matrix of shape \(2, 2\), got \(1, 2\)"):
        plot_accuracy_matrix([[1, 2]], ["a", "b"])
    with pytest.raises(ValueError, match=r"zero_shot has shape \(1,\), 2 names need \(2,\)"):
        plot_accuracy_matrix(np.eye(2), ["a", "b"], zero_shot=[1])


def test_forgetting_curves_start_at_the_pre_trained_model(run: Path) -> None:
    record = Record.load(run)
    figure = forgetting_panels({"ours": record})
    before, after = figure.axes[1].get_lines()[:2]  # the task learned second
    np.testing.assert_array_equal(before.get_ydata(), [40.0, 41.0, 80.0])
    np.testing.assert_array_equal(after.get_xdata(), [2, 3])
    np.testing.assert_array_equal(after.get_ydata(), [80.0, 75.0])
    with pytest.raises(ValueError, match=r"run 'eblora-0' has no score 'f1', only \['accuracy'\]"):
        plot_forgetting(record, score="f1")


def test_nothing_global_changes_and_the_same_figure_gives_the_same_bytes(run: Path) -> None:
    before = dict(mpl.rcParams)
    record = Record.load(run)
    assert to_svg(plot_forgetting(record)) == to_svg(plot_forgetting([record]))
    assert dict(mpl.rcParams) == before


def test_a_run_that_was_never_evaluated_can_still_be_drawn() -> None:
    axes = plot_accuracy_matrix(np.full((2, 2), np.nan), ["a", "b"])
    assert texts(axes) == []
    assert to_svg(axes).startswith("<?xml")


def test_a_zero_update_is_an_error_rather_than_a_nan_in_a_plot() -> None:
    zero = {"h.0.q": (torch.zeros(5, 2), torch.ones(4, 2))}
    adapters = AdapterSet.from_factors({"a": zero, "b": zero})
    with pytest.raises(ValueError, match="every update is zero: there is no spectrum to draw"):
        plot_spectra(adapters)
    with pytest.raises(ValueError, match="no metric 'entropy_energy_normalized' of 'task' updates"):
        plot_entropy_map(adapters)
    assert cells(plot_interference(adapters)).mask.all()  # no direction, no cosine: grey cells


def test_one_task_is_a_fan_of_its_layers_and_several_are_a_line_each(run: Path) -> None:
    adapters = AdapterSet.load(run)
    fan = plot_spectra(singular_values(adapters), task="nouns", label="ours", color="#123456")
    drawn = fan.get_lines()
    assert len(drawn) == 3 + 1 + 1  # three layers, their median, the flat value
    median = np.median([line.get_ydata() for line in drawn[:3]], axis=0)
    np.testing.assert_allclose(drawn[3].get_ydata(), median, rtol=1e-12)
    assert {line.get_color() for line in drawn[:4]} == {"#123456"}
    lines = plot_spectra(adapters).get_lines()
    assert [line.get_label() for line in lines[:3]] == ["news", "nouns", "films"]
    with pytest.raises(ValueError, match=r"no spectra of task 'cats'; there are \['news'"):
        plot_spectra(adapters, task="cats")


def test_the_map_of_the_model_has_blocks_in_rows_and_modules_in_columns(run: Path) -> None:
    table = spectrum_table(AdapterSet.load(run))
    axes = plot_entropy_map(table, task="news")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "10"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mlp", "query"]
    grid = cells(axes).reshape(2, 2)
    assert grid.mask.tolist() == [[False, False], [True, False]]  # block 10 has no mlp
    chosen = table[(table["metric"] == "entropy_energy_normalized") & (table["update"] == "task")]
    expected = chosen[(chosen["task"] == "news") & (chosen["layer"] == "model.layer.10.query")]["value"].item()
    assert grid[1, 1] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="columns is 'colour', choose 'module' or 'task'"):
        plot_entropy_map(table, columns="colour")  # type: ignore[arg-type]


def test_principal_angles_stand_in_the_band_of_random_subspaces() -> None:
    draw = torch.Generator().manual_seed(0)
    drawn = {
        task: {f"h.{i}.q": (torch.randn(80, 4, generator=draw), torch.randn(60, 4, generator=draw)) for i in range(20)}
        for task in "ab"
    }
    axes = plot_principal_angles(AdapterSet.from_factors(drawn))
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    middle, line = axes.get_lines()[:2]
    assert "in R^60" in axes.get_xlabel()
    # medians of 20 layers, 4 degrees from the median of the law at the very most
    np.testing.assert_allclose(line.get_ydata(), middle.get_ydata(), atol=4.0)
    assert low < line.get_ydata().min() < line.get_ydata().max() < high
    with pytest.raises(ValueError, match="no principal angles of side 'inside' in layer 'x'"):
        plot_principal_angles(AdapterSet.from_factors(drawn), side="inside", layer="x")


def test_leakage_and_capacity_are_lines_over_the_tasks(run: Path) -> None:
    table = interference_table(AdapterSet.load(run))
    axes = plot_leakage({"ours": table})
    line, chance = axes.get_lines()[:2]
    total = table[(table["metric"] == "leakage") & (table["layer"] == "total")]
    np.testing.assert_allclose(line.get_ydata(), total["value"], rtol=1e-12)
    np.testing.assert_allclose(chance.get_ydata(), total["chance"], rtol=1e-12)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["nouns", "films"]
    with pytest.raises(ValueError, match="the table of 'bare' has no leakage"):
        plot_leakage({"bare": table[table["metric"] != "leakage"]})
    record = Record.load(run)
    assert plot_capacity(record).get_lines()[0].get_ydata() == pytest.approx([0.1] * 3)
    with pytest.raises(ValueError, match="no run has a memory"):
        plot_capacity(dataclasses.replace(record, capacity=()))


def test_forgetting_is_the_mean_change_since_a_task_was_learned(run: Path) -> None:
    record = Record.load(run)  # [[70, 41, 31], [65, 80, -], [60, 75, 90]]
    axes = plot_forgetting(record)
    thick = axes.get_lines()[3]  # after a thin line a task
    np.testing.assert_allclose(thick.get_ydata(), [0.0, -5.0, -10.0])
    assert plot_forgetting({"x": record}, task="nouns").get_ylabel() == "score on nouns (%)"
    with pytest.raises(ValueError, match="no task 'cats'; the tasks are news, nouns, films"):
        plot_forgetting(record, task="cats")


def test_the_scatter_has_its_fit_and_the_test_within_groups() -> None:
    x = np.array([0.0, 1.0, 2.0, 3.0, 5.0])
    table = pd.DataFrame({"run": list("aaaaabbbbb"), "imbalance": [*x, *x], "forgetting": 2 * np.array([*x, *x]) + 1})
    axes = plot_imbalance(table)
    line = axes.get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), 2 * line.get_xdata() + 1, rtol=1e-12)
    assert texts(axes)[0].startswith("ρ = 1.00, p = 0.00")
    with pytest.raises(ValueError, match="no column 'score'; its columns are"):
        plot_imbalance(table, x="score")
    with pytest.raises(ValueError, match="1 rows have both imbalance and forgetting"):
        plot_imbalance(table[:1])


def test_the_band_of_the_scatter_is_students_and_stays_finite() -> None:
    """Runs with flat spectra have no spread in x of their own: resampled points would often have no line."""
    x, y = np.array([1e-13, 3e-13, 2e-13, 0.31, 0.36]), np.array([1.2, 0.4, 3.0, 12.0, 7.0])
    axes = plot_imbalance(pd.DataFrame({"run": list("aaabb"), "imbalance": x, "forgetting": y}))
    (band,) = [found for found in axes.collections if len(found.get_paths()[0].vertices) > 50]
    corners = band.get_paths()[0].vertices
    fit = stats.linregress(x, y)
    residual = y - fit.intercept - fit.slope * x
    error = np.sqrt((residual**2).sum() / 3)
    at = x.max()
    reach = stats.t.ppf(0.975, 3) * error * np.sqrt(1 / 5 + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    heights = np.unique(np.round(corners[np.isclose(corners[:, 0], at), 1], 9))
    np.testing.assert_allclose(heights, np.array([-1, 1]) * reach + fit.intercept + fit.slope * at, rtol=1e-8)
    assert np.ptp(axes.get_ylim()) < 60  # points


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1e-13, 3e-13, 0.31, 0.36], [1.2, 0.4, 12.0, 7.0]),  # `run --quick`: three tasks, two methods
        ([0.1, 0.2, 0.3, 0.4] * 3, [1.0, 2.0, 4.0, 3.0] * 3),  # the same points again
        ([0.1, 0.1 + 1e-12, 0.2, 0.3, 0.4], [1.0, 1.0, 2.0, 4.0, 3.0]),  # two that differ by rounding
    ],
)
def test_fewer_than_five_distinct_points_have_no_line_band_or_test(x: list[float], y: list[float]) -> None:
    axes = plot_imbalance(pd.DataFrame({"run": "a", "imbalance": x, "forgetting": y}))
    assert len(axes.get_lines()) == 0
    assert all(len(found.get_paths()[0].vertices) < 50 for found in axes.collections)  # markers, and no band
    assert texts(axes) == ["4 distinct points: too few for a line"]
    low, high = axes.get_ylim()
    assert min(y) - 4 < low < min(y) < max(y) < high < max(y) + 4  # the axis holds the points and little more


def test_a_scatter_of_flat_spectra_has_no_line() -> None:
    """Imbalances that differ by rounding only have no slope, and shuffling them tests nothing."""
    y = [3.0, 1.0, 2.0, 5.0, 4.0]
    axes = plot_imbalance(pd.DataFrame({"run": ["a"] * 5, "imbalance": 1e-13 * np.arange(5), "forgetting": y}))
    assert len(axes.get_lines()) == 0
    assert texts(axes) == []
    assert axes.get_xlim() == pytest.approx((-0.05, 0.05))
    own = plot_imbalance(
        pd.DataFrame({"run": ["a"] * 5, "imbalance": 1e-13 * np.arange(5), "forgetting": y}), resolution=0.0
    )
    assert len(own.get_lines()) == 1


def test_figures_are_written_as_vectors_with_text(run: Path, tmp_path: Path) -> None:
    axes = plot_forgetting(Record.load(run))
    svg = save_figure(axes, tmp_path / "new" / "a.svg").read_text()
    assert "tasks learned since" in svg  # text, not outlines
    first = save_figure(axes, tmp_path / "a.pdf").read_bytes()
    assert first.startswith(b"%PDF")
    assert save_figure(axes, tmp_path / "b.pdf").read_bytes() == first
    assert save_figure(axes, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"a\.gif: figures are written as \.svg, \.pdf or \.png"):
        save_figure(axes, tmp_path / "a.gif")


def test_every_figure_fits_one_column_and_draws_where_it_is_told(run: Path) -> None:
    adapters, record = AdapterSet.load(run), Record.load(run)
    table = interference_table(adapters)
    drawings = [
        plot_spectra(adapters),
        plot_entropy_map(adapters),
        plot_interference(table),
        plot_principal_angles(adapters),
        plot_leakage(table),
        plot_capacity(record),
        plot_forgetting(record),
        plot_accuracy_matrix(record.matrix, record.tasks),
    ]
    assert {axes.get_figure().get_figwidth() for axes in drawings} == {3.3}
    mine = Figure().subplots()
    assert plot_spectra(adapters, ax=mine) is mine
