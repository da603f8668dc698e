"""Spectra against products of random factors, tails of spectra, and the table and figure of both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from analysis import AdapterSet, AdapterTables, noise_table, plot_noise, save_figure
from analysis.statistics import NoiseLaws, ProductNull, holm, tail_exponent
from analysis.statistics.noise import largest_draws
from analysis.tables import tail_table

DRAWS = 1000


def dense_spectra(m: int, n: int, r: int, count: int, *, larger: int = 0, seed: int = 0) -> np.ndarray:
    """Singular values of dense products (m, n), the slow way; some columns of the left factor are ten times larger."""
    draw = np.random.default_rng(seed)
    left, right = draw.standard_normal((count, m, r)), draw.standard_normal((count, r, n))
    left[..., :larger] *= 10
    return np.linalg.svd(left @ right, compute_uv=False)[:, :r]


def random_updates(layers: int, *, larger: int = 0, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        f"h.{i}.q": (torch.randn(40, 6, generator=draw), torch.randn(30, 6, generator=draw)) for i in range(layers)
    }
    for left, _ in factors.values():
        left[:, :larger] *= 10
    return factors


@pytest.mark.parametrize(("m", "n", "r"), [(4096, 11008, 16), (24, 24, 24), (50, 40, 1)])
def test_the_largest_of_each_draw_is_that_of_the_sample(m: int, n: int, r: int) -> None:
    null = ProductNull(m, n, r)
    # both round r² products of the largest value
    assert largest_draws(null, DRAWS, seed=3) == pytest.approx(null.sample(DRAWS, seed=3)[:, 0], rel=1e-13)


@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 6), (60, 200, 4), (24, 24, 20)])
def test_the_sampler_draws_the_spectra_of_dense_products(m: int, n: int, r: int) -> None:
    squares = dense_spectra(m, n, r, DRAWS) ** 2
    slow = squares / squares.mean(1, keepdims=True)
    fast = ProductNull(m, n, r).sample(DRAWS, seed=1)
    # two samples of 1000: their means differ by at most five standard errors, one false alarm in 10^6
    errors = np.sqrt((slow.var(0) + fast.var(0)) / DRAWS)
    assert (np.abs(slow.mean(0) - fast.mean(0)) < 5 * errors).all()
    assert fast[:, 0].var() == pytest.approx(slow[:, 0].var(), rel=0.4)  # a relative error of about √(2 · 3 / 1000)


@pytest.mark.parametrize(("m", "n", "r"), [(64, 48, 8), (4096, 1024, 16), (100, 100, 50), (30, 90, 2)])
def test_the_density_has_mass_and_mean_one_and_ends_at_the_edge(m: int, n: int, r: int) -> None:
    null = ProductNull(m, n, r)
    mass, mean = (integrate.quad(lambda x, k=k: x**k * null.density(x), 0, null.edge, limit=400)[0] for k in (0, 1))
    assert (mass, mean) == pytest.approx((1, 1), abs=2e-3)  # of the quadrature, at square roots
    assert null.density(1.0001 * null.edge) == pytest.approx(0, abs=1e-6)
    assert null.density(0.999 * null.edge) > 0


def test_the_edge_is_the_limit_of_large_products() -> None:
    """The mean of the largest is below the limit by a few r^(-2/3), as for one factor."""
    for scale, allowed in ((1, 0.3), (8, 0.08)):
        null = ProductNull(32 * scale, 32 * scale, 8 * scale)
        below = 1 - null.sample(200)[:, 0].mean() / null.edge
        assert 0 < below < allowed
    assert ProductNull(10**9, 10**9, 8).edge == pytest.approx(1, abs=1e-3)  # orthonormal factors: a flat spectrum


def test_p_values_of_noise_are_uniform_and_directions_are_counted() -> None:
    laws = NoiseLaws()
    noise = next(laws.p_values(dense_spectra(40, 30, 6, DRAWS), 40, 30, level=0.05))
    for level in (0.05, 0.25, 0.75):
        # four standard errors, and a twentieth of the level for the fitted law
        assert (noise <= level).mean() == pytest.approx(
            level, abs=4 * (level * (1 - level) / DRAWS) ** 0.5 + level / 20
        )
    steps = list(laws.p_values(dense_spectra(40, 30, 6, DRAWS, larger=2), 40, 30, level=0.05))
    counted = np.sum([step <= 0.05 for step in steps], axis=0)
    assert counted.min() == 2
    assert (counted > 2).mean() == pytest.approx(0.05, abs=0.03)  # four standard errors
    assert np.isnan(steps[3]).mean() > 0.9  # spectra that stopped take no further test


def test_each_step_has_the_law_of_a_smaller_product() -> None:
    laws, sigma = NoiseLaws(), np.array([[30.0, 3.0, 2.0, 1.5, 1.0, 0.5]])
    second = list(laws.p_values(sigma, 12, 8, level=0.05))[1]
    rest = sigma[0, 1:] ** 2
    assert second[0] == laws.largest(11, 7, 5).sf(rest[0] / rest.mean())


def test_the_level_of_a_count_is_shared_by_the_layers_of_a_task() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 6, generator=draw)).Q for n in (40, 30))
    sigma = torch.tensor([2.1, 1.0, 1.0, 1.0, 1.0, 1.0])
    pair = (left * sigma, right)
    few, many = (noise_table(AdapterSet.from_factors({"a": {f"h.{i}": pair for i in range(k)}})) for k in (1, 400))
    assert few["p"][0] == many["p"][0]
    assert 0.05 / 400 < few["p"][0] < 0.05
    assert (few["beyond"][0], many["beyond"].max()) == (1, 0)


def test_the_table_counts_planted_directions_and_is_silent_on_noise() -> None:
    updates = {"noise": random_updates(6), "spiked": random_updates(6, larger=2, seed=1)}
    table = noise_table(AdapterSet.from_factors(updates))
    noise, spiked = (table[table["task"] == task] for task in ("noise", "spiked"))
    assert noise["beyond"].tolist() == [0] * 6
    assert spiked["beyond"].tolist() == [2] * 6
    assert (noise["p_holm"] > 0.05).all()
    assert (spiked["p_holm"] < 1e-3).all()
    np.testing.assert_array_equal(spiked["p_holm"], holm(spiked["p"]))
    left, right = updates["spiked"]["h.3.q"]
    sigma = np.linalg.svd((left @ right.mT).double().numpy(), compute_uv=False)[:6]
    row = spiked.set_index("layer").loc["h.3.q"]
    assert row["spike"] == pytest.approx(6 * sigma[0] ** 2 / (sigma**2).sum(), rel=1e-5)  # float32 product
    assert row["edge"] == pytest.approx(ProductNull(40, 30, 6).edge)
    assert row["chance"] < row["edge"] < 1.1 * row["high"]


def test_flat_spectra_are_flatter_than_noise() -> None:
    eye = torch.eye(20)
    table = noise_table(AdapterSet.from_factors({"a": {"h.0.q": (eye[:, :5], eye[:, :5])}}))
    assert (table["spike"].item(), table["beyond"].item()) == (pytest.approx(1), 0)
    assert table["p"].item() > 0.999


def test_updates_without_a_law_have_rows_without_one() -> None:
    one = torch.ones(8, 1)
    zero = torch.zeros(8, 1)
    double = torch.ones(8, 2)  # two equal directions: numerical rank 1
    factors = {"a": {"x": (one, one), "y": (zero, zero), "z": (double, double)}}
    table = noise_table(AdapterSet.from_factors(factors))
    assert table[["layer", "rank"]].to_numpy().tolist() == [["x", 1], ["z", 1]]
    assert table[["chance", "high", "edge", "p", "p_holm", "beyond"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="rank 2"):
        plot_noise(table)


def test_differences_of_checkpoints_are_compared_with_no_law(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        save_file({"h.0.q.weight": torch.randn(6, 5, generator=draw)}, tmp_path / f"{name}.safetensors")
    dense = AdapterSet.load(tmp_path / "tuned.safetensors", base=tmp_path / "base.safetensors")
    assert noise_table(dense)["p"].isna().all()


def test_all_tables_of_one_pass_agree() -> None:
    adapters = AdapterSet.from_factors({"a": random_updates(2), "b": random_updates(2, larger=1, seed=3)})
    assert AdapterTables(adapters).noise.equals(noise_table(adapters))


def test_the_figure_marks_what_is_beyond_noise(tmp_path: Path) -> None:
    adapters = AdapterSet.from_factors({"noise": random_updates(4), "spiked": random_updates(4, larger=1, seed=2)})
    axes = plot_noise(adapters)
    faces = [points.get_facecolor() for points in axes.collections if len(points.get_offsets()) == 4]
    filled = [(face[:, 3] > 0).tolist() for face in faces if face.shape == (4, 4)]
    assert filled == [[False] * 4, [True] * 4]
    assert "open: not beyond noise" in {text.get_text() for text in axes.get_legend().get_texts()}
    assert save_figure(axes.get_figure(), tmp_path / "noise.svg").exists()


def test_the_exponent_of_a_power_law_is_found() -> None:
    draw = np.random.default_rng(0)
    squares = np.exp(draw.exponential(1 / 1.5, 2000))  # density λ^-2.5 above 1
    fit = tail_exponent(np.sqrt(squares), samples=50)
    assert fit.reason == ""
    assert fit.low < 2.5 < fit.high
    assert fit.high - fit.low < 0.8
    # Hill's estimate by hand, over the tail that was chosen
    tail = np.sort(squares)[::-1][: fit.count]
    assert fit.exponent == pytest.approx(1 + (fit.count - 1) / np.log(tail / tail[-1]).sum())
    scaled = tail_exponent(10 * np.sqrt(squares), samples=50)
    assert (scaled.exponent, scaled.start) == pytest.approx((fit.exponent, 100 * fit.start))


@pytest.mark.parametrize(
    ("sigma", "reason"),
    [
        (np.arange(1.0, 17.0), "16 singular values above rounding, 50 are needed"),
        (np.r_[np.ones(49), np.zeros(30)], "49 singular values above rounding, 50 are needed"),
        (np.ones(60), "all singular values are equal"),
        (
            np.linalg.svd(np.random.default_rng(0).standard_normal((256, 128)), compute_uv=False),
            "does not fit, p = 0.0",
        ),
    ],
)
def test_no_exponent_without_a_power_law(sigma: np.ndarray, reason: str) -> None:
    fit = tail_exponent(sigma)
    assert reason in fit.reason
    assert np.isnan([fit.exponent, fit.low, fit.high]).all()


def test_the_table_of_tails_has_a_row_per_update_with_its_reason() -> None:
    draw = np.random.default_rng(0)
    powers = np.sqrt(np.exp(draw.exponential(1 / 1.5, 60)))
    eye = torch.eye(64)[:, :60]
    large = (eye * torch.from_numpy(powers).float(), eye)
    adapters = AdapterSet.from_factors({"a": {"h.0.q": large, "h.1.q": (eye[:, :4], eye[:, :4])}})
    table = tail_table(adapters, samples=20)
    assert table[["update", "layer", "block"]].to_numpy().tolist() == [
        *(["task", "h.0.q", 0], ["task", "h.1.q", 1]),
        *(["accumulated", "h.0.q", 0], ["accumulated", "h.1.q", 1]),
    ]
    expected = tail_exponent(powers, samples=20)
    assert table["exponent"].iloc[0] == pytest.approx(expected.exponent, rel=1e-4)  # float32 factors
    assert table["reason"].iloc[1] == "4 singular values above rounding, 50 are needed"


def test_numbers_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 9 must lie between 1 and the smaller side of \(8, 20\)"):
        ProductNull(8, 20, 9)
    with pytest.raises(ValueError, match="not negative"):
        tail_exponent([1.0, np.nan])
    with pytest.raises(ValueError, match=r"level is 1\.5"):
        tail_exponent(np.ones(60), level=1.5)
