from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analysis import (
    AdapterSet,
    Record,
    interference_table,
    plot_accuracy_matrix,
    plot_entropy_map,
    plot_forgetting,
    plot_interference,
    plot_spectra,
    spectrum_table,
)
from analysis.plots import PALETTE, to_svg


@pytest.fixture
def run(tmp_path: Path, write_run: Callable[..., Path]) -> Path:
    return write_run(tmp_path / "run")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def cells(figure: Figure, panel: int = 0) -> np.ma.MaskedArray:
    return np.ma.masked_invalid(figure.axes[panel].collections[0].get_array())


def test_flat_spectra_lie_on_one_and_steep_ones_where_they_should() -> None:
    eye = torch.eye(6)[:, :3]
    flat = AdapterSet.from_factors({"a": {"x": (7 * eye, eye)}})
    steep = AdapterSet.from_factors({"a": {"x": (eye * torch.tensor([2.0, 1.0, 1.0]), eye)}})
    axes = plot_spectra({"flat": flat, "steep": steep}).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(lines["flat"].get_ydata(), [1, 1, 1], rtol=1e-12)
    # norm² = 6, flat value √2
    np.testing.assert_allclose(lines["steep"].get_ydata(), np.array([2, 1, 1]) / np.sqrt(2), rtol=1e-12)
    assert axes.get_title(loc="left") == "1  a"
    assert [lines[name].get_color() for name in lines if name in ("flat", "steep")] == list(PALETTE[:2])


def test_spectra_have_a_panel_a_task(run: Path) -> None:
    figure = plot_spectra(AdapterSet.load(run), update="accumulated", palette={"": "#123456"})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1  news", "2  nouns", "3  films"]
    widths = [len(axes.get_lines()[0].get_xdata()) for axes in figure.axes]
    assert widths == [3, 6, 9]  # stacked ranks
    assert figure.axes[0].get_lines()[0].get_color() == "#123456"
    with pytest.raises(ValueError, match="update is 'both', choose 'task' or 'accumulated'"):
        plot_spectra(AdapterSet.load(run), update="both")


def test_different_streams_do_not_share_panels(run: Path) -> None:
    whole, part = AdapterSet.load(run), AdapterSet.load(run / "tasks" / "01-news")
    with pytest.raises(ValueError, match="'a' and 'b' have different tasks: news, nouns, films; news"):
        plot_spectra({"a": whole, "b": part})
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_spectra({})


def test_the_entropy_map_shows_the_numbers_of_the_table(run: Path) -> None:
    adapters = AdapterSet.load(run)
    table = spectrum_table(adapters)
    figure = plot_entropy_map(table)
    chosen = table[(table["metric"] == "entropy_energy_normalized") & (table["update"] == "accumulated")]
    for row, layer in enumerate(adapters.layers):
        expected = chosen[chosen["layer"] == layer]["value"].to_numpy()
        np.testing.assert_allclose(cells(figure, 1).reshape(3, 3)[row], expected, rtol=1e-12)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0.mlp", "0.query", "10.query"]
    assert figure.axes[0].get_ylim() == (3, 0)  # first layer on top
    with pytest.raises(ValueError, match="no metric 'colour' of 'task' updates; there are"):
        plot_entropy_map(table, metric="colour")


def test_interference_is_symmetric_with_a_blank_diagonal(run: Path) -> None:
    adapters = AdapterSet.load(run)
    table = interference_table(adapters)
    figure = plot_interference(adapters, metric="alignment", layer="model.layer.0.mlp")
    grid = cells(figure).reshape(3, 3)
    assert grid.mask.diagonal().all()
    chosen = table[(table["metric"] == "alignment") & (table["layer"] == "model.layer.0.mlp")]
    np.testing.assert_allclose(grid[[1, 2, 2], [0, 0, 1]], chosen["value"], rtol=1e-12)
    np.testing.assert_array_equal(grid[[0, 0, 1], [1, 2, 2]], grid[[1, 2, 2], [0, 0, 1]])
    low, high = figure.axes[0].collections[0].get_clim()
    assert low == -high


def test_overlap_marks_chance_and_leakage_is_one_column(run: Path) -> None:
    table = interference_table(AdapterSet.load(run))
    overlap = plot_interference(table, metric="input_overlap")
    assert any(label.get_text() == "chance 0.3" for label in overlap.axes[1].get_yticklabels())  # r / n = 3 / 10
    leakage = plot_interference(table, metric="leakage")
    assert cells(leakage).reshape(2, 1).shape == (2, 1)
    assert [label.get_text() for label in leakage.axes[0].get_yticklabels()] == ["nouns", "films"]
    with pytest.raises(ValueError, match="no 'alignment' of layer 'nowhere'; the metrics are"):
        plot_interference(table, layer="nowhere")


def test_the_accuracy_matrix_has_a_pre_trained_row_and_blanks() -> None:
    figure = plot_accuracy_matrix([[70, 41], [65, np.nan]], ["a", "b"], zero_shot=[50, 40])
    assert texts(figure) == ["50.0", "40.0", "70.0", "41.0", "65.0"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["pre-trained", "after a", "after b"]
    with pytest.raises(ValueError, match=r"2 names need a matrix of shape \(2, 2\), got \(1, 2\)"):
        plot_accuracy_matrix([[1, 2]], ["a", "b"])
    with pytest.raises(ValueError, match=r"zero_shot has shape \(1,\), 2 names need \(2,\)"):
        plot_accuracy_matrix(np.eye(2), ["a", "b"], zero_shot=[1])


def test_forgetting_curves_start_at_the_pre_trained_model(run: Path) -> None:
    record = Record.load(run)
    figure = plot_forgetting({"ours": record})
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
    figure = plot_accuracy_matrix(np.full((2, 2), np.nan), ["a", "b"])
    assert texts(figure) == []
    assert to_svg(figure).startswith("<?xml")


def test_updates_that_are_zero_are_blank_rather_than_an_error() -> None:
    zero = {"h.0.q": (torch.zeros(5, 2), torch.ones(4, 2))}
    adapters = AdapterSet.from_factors({"a": zero, "b": zero})
    for figure in (plot_entropy_map(adapters), plot_interference(adapters)):
        assert cells(figure).mask.all()
        assert to_svg(figure).startswith("<?xml")
    assert to_svg(plot_spectra(adapters)).startswith("<?xml")
