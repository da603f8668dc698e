import doctest
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import analysis
from analysis import AdapterSet, singular_values, spectrum_table
from analysis.numerics import spectral_measures
from analysis.numerics.decomposition import cholesky_qr, thin_qr, triangle

Updates = dict[str, dict[str, tuple[Tensor, Tensor]]]
POWER_LAW = 1.0 / np.arange(1, 17)
EPS = 2.0**-52


def dense(pair: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
    return (pair[0].double() @ pair[1].double().T).numpy()


def updates(ranks: dict[str, int], *, seed: int = 0) -> Updates:
    """Layers of three shapes, one of them narrower than the sum of the ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"h.0.q": (12, 9), "h.1.q": (12, 9), "h.0.mlp": (6, 15)}

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return {task: {layer: (draw(m, r), draw(n, r)) for layer, (m, n) in shapes.items()} for task, r in ranks.items()}


ROOT = Path(analysis.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_table_of_a_power_law_spectrum() -> None:
    """docs/analysis.md, "Spectra", last column: sigma_k = 1/k, r = 16."""
    assert float(spectral_measures.spectral_entropy(POWER_LAW, normalized=True)) == pytest.approx(0.488, abs=5e-4)
    assert float(spectral_measures.effective_rank(POWER_LAW)) == pytest.approx(3.87, abs=5e-3)
    assert float(spectral_measures.participation_ratio(POWER_LAW)) == pytest.approx(2.32, abs=5e-3)
    assert float(spectral_measures.stable_rank(POWER_LAW)) == pytest.approx(1.58, abs=5e-3)
    assert float(spectral_measures.top_energy(POWER_LAW, 1)) == pytest.approx(0.631, abs=5e-4)
    assert float(spectral_measures.spectral_flatness(POWER_LAW)) == pytest.approx(0.218, abs=5e-4)
    assert float(spectral_measures.gini(POWER_LAW)) == pytest.approx(0.80, abs=5e-3)
    assert float(spectral_measures.condition_number(POWER_LAW)) == pytest.approx(16.0, rel=4 * EPS)


def test_the_two_conventions_of_entropy_differ() -> None:
    shares = POWER_LAW / POWER_LAW.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert float(spectral_measures.effective_rank(POWER_LAW, weights="singular")) == pytest.approx(expected, rel=1e-12)
    assert expected > 2 * float(spectral_measures.effective_rank(POWER_LAW))  # 10.6 against 3.9


@given(st.integers(2, 40), st.floats(-300, 300))
def test_a_flat_spectrum_has_full_ranks_at_every_scale(r: int, exponent: float) -> None:
    sigma = np.full(r, 2.0**exponent)
    for rank in (
        spectral_measures.effective_rank,
        spectral_measures.participation_ratio,
        spectral_measures.stable_rank,
    ):
        assert float(rank(sigma)) == pytest.approx(r, rel=1e-12)  # r terms of relative error eps
    assert float(spectral_measures.spectral_entropy(sigma, normalized=True)) == pytest.approx(1.0, rel=1e-12)
    assert float(spectral_measures.gini(sigma)) == pytest.approx(0.0, abs=1e-12)
    assert float(spectral_measures.spectral_flatness(sigma)) == pytest.approx(1.0, rel=1e-12)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_ranks_are_ordered_and_bounded(values: list[float]) -> None:
    """Renyi entropies decrease in their order: 1, 2, infinity; all lie in [1, r]."""
    ranks = [
        float(rank(values))
        for rank in (
            spectral_measures.stable_rank,
            spectral_measures.participation_ratio,
            spectral_measures.effective_rank,
        )
    ]
    slack = 1e-9  # rounding of logarithms and sums of at most 20 terms, with room
    assert 1 - slack <= ranks[0] <= ranks[1] * (1 + slack)
    assert ranks[1] <= ranks[2] * (1 + slack) <= len(values) * (1 + slack) ** 2
    assert float(spectral_measures.top_energy(values, len(values))) == pytest.approx(1.0, rel=slack)


def test_zero_spectra_are_an_error_and_vanishing_values_count_for_nothing() -> None:
    two = np.array([[1.0, 1.0], [0.0, 0.0]])
    for metric in (
        spectral_measures.effective_rank,
        spectral_measures.condition_number,
        spectral_measures.gini,
        spectral_measures.stable_rank,
    ):
        with pytest.raises(ValueError, match="1 of 2 spectra are zero: a zero update has no spread"):
            metric(two)
    assert float(spectral_measures.frobenius_norm([0.0, 0.0])) == 0.0
    assert np.isnan(spectral_measures.spectral_entropy([1.0], normalized=True))
    assert float(spectral_measures.frobenius_norm([3.0, 4.0, 0.0])) == 5.0
    assert float(spectral_measures.spectral_norm([3.0, 4.0, 0.0])) == 4.0
    assert float(spectral_measures.condition_number([3.0, 0.0])) == np.inf
    assert float(spectral_measures.spectral_flatness([3.0, 0.0])) == 0.0
    assert float(spectral_measures.effective_rank([3.0, 3.0, 0.0])) == pytest.approx(2.0, rel=4 * EPS)


def test_wrong_spectra_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one singular value, got shape \(0,\)"):
        spectral_measures.stable_rank([])
    with pytest.raises(ValueError, match="finite and not negative"):
        spectral_measures.stable_rank([1.0, -1.0])
    with pytest.raises(ValueError, match="finite and not negative"):
        spectral_measures.frobenius_norm([1.0, np.nan])
    with pytest.raises(ValueError, match="k is 0, at least 1"):
        spectral_measures.top_energy([1.0], 0)
    with pytest.raises(ValueError, match="weights is 'both', choose 'energy'"):
        spectral_measures.spectral_entropy([1.0], weights="both")  # type: ignore[arg-type]


def values_of(frame: pd.DataFrame, task: str, update: str, layer: str) -> NDArray[np.float64]:
    chosen = frame[(frame["task"] == task) & (frame["update"] == update) & (frame["layer"] == layer)]
    assert chosen["index"].tolist() == list(range(1, len(chosen) + 1))
    return chosen["value"].to_numpy()


def test_singular_values_are_those_of_the_dense_updates_and_of_their_sums() -> None:
    drawn = updates({"a": 3, "b": 4, "c": 2})
    frame = singular_values(AdapterSet.from_factors(drawn))
    for layer in ("h.0.q", "h.1.q", "h.0.mlp"):
        total, width = 0.0, 0
        for task, rank in (("a", 3), ("b", 4), ("c", 2)):
            update = dense(drawn[task][layer])
            total, width = total + update, min(width + rank, *update.shape)
            for name, matrix, count in (("task", update, rank), ("accumulated", total, width)):
                found = values_of(frame, task, name, layer)
                expected = np.linalg.svd(matrix, compute_uv=False)
                assert len(found) == count
                # float64 throughout; a few dozen roundings relative to the largest value
                np.testing.assert_allclose(found, expected[:count], rtol=0, atol=100 * EPS * expected[0])


def test_small_singular_values_survive() -> None:
    """A spectrum down to 1e-6 of its top, in factors that a Gram matrix in float32 would ruin."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(64, 8, generator=generator)).Q
    mixing = torch.randn(8, 8, generator=generator)
    right = torch.linalg.qr(torch.randn(48, 8, generator=generator)).Q
    sigma = torch.logspace(0, -6, 8)
    pair = (left * sigma @ torch.linalg.qr(mixing).Q, right @ torch.linalg.qr(mixing).Q)
    found = singular_values(AdapterSet.from_factors({"a": {"x": pair}}))
    found = values_of(found, "a", "task", "x")
    expected = np.linalg.svd(dense(pair), compute_uv=False)[:8]
    assert expected[-1] / expected[0] < 3e-6
    np.testing.assert_allclose(found, expected, rtol=1e-9)  # eps / 1e-6, with room


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_any_shape_even_a_rank_above_the_size(m: int, n: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = (torch.randn(m, r, generator=generator), torch.randn(n, r, generator=generator))
    found = values_of(singular_values(AdapterSet.from_factors({"a": {"x": pair}})), "a", "task", "x")
    expected = np.linalg.svd(dense(pair), compute_uv=False)[: min(m, n, r)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1000 * EPS * expected[0])  # 12² roundings each


def test_the_table_is_tidy_and_holds_the_functions_of_the_spectra() -> None:
    adapters = AdapterSet.from_factors(updates({"a": 3, "b": 4}))
    table, sigma = spectrum_table(adapters, top=(2,)), singular_values(adapters)
    assert table.columns.tolist() == [*("task", "update", "layer", "module", "block", "metric", "value")]
    assert len(table) == 2 * 2 * 3 * table["metric"].nunique()
    row = table[(table["task"] == "b") & (table["update"] == "accumulated") & (table["layer"] == "h.1.q")]
    assert set(row["module"]) == {"q"}
    assert set(row["block"]) == {1}
    numbers = row.set_index("metric")["value"]
    spectrum = values_of(sigma, "b", "accumulated", "h.1.q")
    assert numbers["top2_energy"] == float(spectral_measures.top_energy(spectrum, 2))
    assert numbers["effective_rank_roy_vetterli"] == float(
        spectral_measures.effective_rank(spectrum, weights="singular")
    )
    assert numbers["entropy_energy_normalized"] == float(spectral_measures.spectral_entropy(spectrum, normalized=True))
    assert numbers["frobenius"] == float(spectral_measures.frobenius_norm(spectrum))
    order = table[["task", "update", "layer"]].drop_duplicates()
    assert order["layer"].tolist() == ["h.0.mlp", "h.0.q", "h.1.q"] * 4
    assert order["task"].tolist() == ["a"] * 6 + ["b"] * 6


def test_layers_without_a_number_have_no_block() -> None:
    pair = (torch.randn(4, 2), torch.randn(5, 2))
    table = spectrum_table(AdapterSet.from_factors({"a": {"head": pair}}))
    assert table["block"].isna().all()
    assert set(table["module"]) == {"head"}


def test_the_budget_of_memory_does_not_change_the_numbers() -> None:
    """A budget of one byte forces one layer at a time."""
    adapters = AdapterSet.from_factors(updates({"a": 3, "b": 4}))
    seen: list[tuple[int, int]] = []
    single = singular_values(adapters, memory_budget=1, progress=lambda done, total: seen.append((done, total)))
    pd.testing.assert_frame_equal(single, singular_values(adapters), rtol=1e-13)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_zero_update_is_named_or_left_out_when_asked() -> None:
    drawn = updates({"a": 3, "b": 4})
    drawn["b"]["h.0.q"] = (torch.zeros(12, 4), torch.ones(9, 4))
    drawn["b"]["h.1.q"] = (-drawn["a"]["h.1.q"][0], drawn["a"]["h.1.q"][1])  # undoes what a did
    adapters = AdapterSet.from_factors(drawn)
    with pytest.raises(ValueError, match=r"2 updates are zero and have no spectrum, the first is b: h\.\d\.q \("):
        spectrum_table(adapters)
    table = spectrum_table(adapters, zeros="omit")
    assert not table["value"].isna().any()
    kept = set(zip(table["task"], table["update"], table["layer"], strict=True))
    assert ("b", "task", "h.0.q") not in kept
    assert ("b", "accumulated", "h.1.q") not in kept
    assert {("b", "accumulated", "h.0.q"), ("b", "task", "h.1.q")} <= kept
    with pytest.raises(ValueError, match="zeros is 'skip', choose 'raise' or 'omit'"):
        spectrum_table(adapters, zeros="skip")  # type: ignore[arg-type]


def test_an_update_of_rank_zero_is_a_zero_update() -> None:
    adapters = AdapterSet.from_factors({"a": {"x": (torch.zeros(5, 0), torch.zeros(4, 0))}})
    with pytest.raises(ValueError, match=r"2 updates are zero and have no spectrum, the first is a: x \(task\)"):
        spectrum_table(adapters)
    assert spectrum_table(adapters, zeros="omit").empty


def test_renyi_entropies_join_shannon_the_number_of_values_and_the_largest() -> None:
    sigma = [3.0, 1.0, 0.0]
    assert float(spectral_measures.renyi_entropy(sigma, 1)) == float(spectral_measures.spectral_entropy(sigma))
    assert float(spectral_measures.renyi_entropy(sigma, 0)) == pytest.approx(np.log(2), rel=4 * EPS)
    assert float(spectral_measures.renyi_entropy(sigma, np.inf)) == pytest.approx(-np.log(0.9), rel=4 * EPS)
    near = float(spectral_measures.renyi_entropy(sigma, 1 + 1e-6))
    assert near == pytest.approx(float(spectral_measures.spectral_entropy(sigma)), abs=1e-5)  # continuous in the order
    with pytest.raises(ValueError, match="order is -1, a number from 0 to infinity"):
        spectral_measures.renyi_entropy(sigma, -1)


@pytest.mark.parametrize("steep", [0.0, -6.0])
def test_products_in_double_precision_give_the_qr_of_householder(steep: float) -> None:
    """What a GPU runs, on this machine: columns of very different lengths, down to 1e-6."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 60, 5, generator=draw, dtype=torch.float64) * torch.logspace(0, steep, 5, dtype=torch.float64)
    q, r = cholesky_qr(x)
    eye = torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=50 * EPS)  # sums of 60 products
    torch.testing.assert_close(q @ r, x, rtol=0, atol=50 * EPS * x.abs().max().item())
    x[1, :, 3] = 0.0  # a column that is never used, and one that depends on another
    x[2, :, 4] = x[2, :, 0] * 3
    q, r = cholesky_qr(x)
    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=50 * EPS)
    torch.testing.assert_close(q @ r, x, rtol=0, atol=50 * EPS * x.abs().max().item())


@pytest.mark.parametrize("function", [triangle, thin_qr])
def test_householder_runs_on_one_thread_and_others_are_given_back(
    function: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    qr, before = torch.linalg.qr, torch.get_num_threads()
    seen: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(torch.get_num_threads())
        return qr(*args, **options)

    monkeypatch.setattr(torch.linalg, "qr", watched)
    torch.set_num_threads(2)
    try:
        function(torch.randn(2, 9, 3, dtype=torch.float64))
        assert (seen, torch.get_num_threads()) == ([1], 2)
        with pytest.raises(RuntimeError):
            function(torch.ones(3, dtype=torch.float64))  # no matrix
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_table() -> None:
    adapters = AdapterSet.from_factors(updates({"a": 3, "b": 4}))
    pd.testing.assert_frame_equal(spectrum_table(adapters, "cuda"), spectrum_table(adapters), rtol=1e-9)
