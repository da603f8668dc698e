"""What chance would do, beside chance itself."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis import (
    AdapterSet,
    against_chance,
    bootstrap_interval,
    imbalance_table,
    interference_table,
    over_seeds,
    permutation_test,
    spectrum_table,
)
from analysis.statistics import OverlapNull, alignment_p_value, holm
from analysis.statistics.nulls import angle_band, random_block, random_cosines
from analysis.tables.interference import energy_share_variance

DRAWS = 4000


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_the_closed_forms_are_the_moments_of_random_subspaces(n: int, a: int, b: int, seed: int) -> None:
    null = OverlapNull(n, min(a, n), min(b, n))
    found = null.sample(DRAWS, seed=seed)
    # six standard errors: one false alarm in 10^8 draws of this test
    assert found.mean() == pytest.approx(null.mean, abs=6 * null.std / DRAWS**0.5 + 1e-12)
    # the kurtosis of these laws stays below 15, so the variance has a relative error of at most √(14 / DRAWS)
    assert found.var() == pytest.approx(null.variance, rel=6 * (14 / DRAWS) ** 0.5, abs=1e-12)


def test_the_sampler_draws_what_dense_random_frames_give() -> None:
    draw = np.random.default_rng(0)
    fast = random_cosines(12, 3, 4, DRAWS, draw=draw)
    frames = np.linalg.qr(draw.standard_normal((DRAWS, 12, 4))).Q
    slow = np.linalg.svd(frames[:, :3], compute_uv=False)
    # quantiles of 4000 draws of numbers in [0, 1] with densities near 1 or above: 0.05 is five standard errors
    for q in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(fast, q, axis=0), np.quantile(slow, q, axis=0), atol=0.05)
    with pytest.raises(ValueError, match="a \\+ b = 7 is larger than n = 6: take the complements"):
        random_block(6, 3, 4, 1, draw=draw)


@pytest.mark.parametrize(("n", "a", "b"), [(30, 1, 5), (5, 4, 3), (64, 8, 8), (10, 7, 6)])
def test_quantiles_and_p_values_are_those_of_the_draws(n: int, a: int, b: int) -> None:
    null = OverlapNull(n, a, b)
    found = np.sort(null.sample(20_000, seed=1))
    for q in (0.05, 0.5, 0.95, 0.99):
        share = (found <= null.quantile(q)).mean()
        # three standard errors of a share, and half a percent for the laws that are not exact
        assert share == pytest.approx(q, abs=3 * (q * (1 - q) / 20_000) ** 0.5 + (0.0 if null.exact else 0.005))
        assert float(null.p_value(null.quantile(q))) == pytest.approx(1 - q, abs=1e-9)  # inverse of each other
    assert null.exact == (n in (30, 5))


def test_subspaces_that_must_meet_do() -> None:
    whole = OverlapNull(5, 5, 2)
    assert (whole.mean, whole.variance) == (1.0, 0.0)
    assert whole.quantile(0.3) == 1.0
    assert whole.p_value([1.0]).tolist() == [1.0]
    assert random_cosines(5, 4, 3, 10, draw=np.random.default_rng(0))[:, :2] == pytest.approx(np.ones((10, 2)))
    with pytest.raises(ValueError, match="dimensions 6 and 2 must lie between 1 and n = 5"):
        OverlapNull(5, 6, 2)


def test_the_band_of_principal_angles_holds_what_it_says() -> None:
    low, middle, high = angle_band(20, 3, 4, level=0.9, samples=4000, seed=0)
    assert (low < middle).all()
    assert (middle < high).all()
    found = np.arccos(random_cosines(20, 3, 4, 4000, draw=np.random.default_rng(9)))
    inside = ((found > low) & (found < high)).mean(axis=0)
    np.testing.assert_allclose(inside, 0.9, atol=0.03)  # two samples of 4000, four standard errors each


def random_set(r: int, *, m: int = 60, n: int = 50, layers: int = 300, decay: float = 0.7) -> AdapterSet:
    """Updates with steep spectra in random directions: the null itself."""
    draw = torch.Generator().manual_seed(0)

    def frame(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, r, generator=draw)).Q

    sigma = decay ** torch.arange(r)
    return AdapterSet.from_factors(
        {task: {f"h.{i}.q": (frame(m) * sigma, frame(n)) for i in range(layers)} for task in ("a", "b")}
    )


@pytest.mark.parametrize("r", [1, 4])
def test_random_updates_have_z_scores_of_spread_one_and_flat_p_values(r: int) -> None:
    protected = {f"h.{i}.q": torch.eye(50)[:, :10] for i in range(300)}
    table = against_chance(interference_table(random_set(r), protected=protected))
    single = table[table["layer"] != "total"]
    for metric in ("input_overlap", "output_overlap", "alignment", "backward", "leakage"):
        rows = single[single["metric"] == metric]
        spread = 0.25 if r > 1 else 0.6  # a product of two normal numbers has kurtosis 9
        assert rows["z"].mean() == pytest.approx(0.0, abs=5 * 300**-0.5), metric
        assert rows["z"].std() == pytest.approx(1.0, abs=spread), metric
        for level in (0.1, 0.5):  # shares of 300 rows or more: five standard errors
            share = (rows["p"] < level).mean()
            assert share == pytest.approx(level, abs=5 * (level * (1 - level) / 300) ** 0.5), metric
        assert (rows["p_holm"] >= rows["p"]).all()
        assert (rows["p_holm"] < 0.01).sum() == 0, metric
    assert set(table[table["layer"] == "total"]["metric"]) >= {"input_overlap", "alignment", "backward", "leakage"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "k", "found"),
    [
        (1 / np.arange(1, 17), 1, {0.05: 0.050, 0.01: 0.013, 0.001: 0.0022}),  # what docs/analysis.md says
        (1 / np.arange(1, 17), 16, {0.05: 0.053, 0.01: 0.012, 0.001: 0.0016}),
        (np.ones(16), 1, {0.05: 0.05, 0.01: 0.01, 0.001: 0.001}),
        (np.ones(1), 4, {0.05: 0.05, 0.01: 0.01, 0.001: 0.001}),  # rank one
    ],
)
def test_p_values_of_leakage_are_as_far_off_for_steep_spectra_as_we_say(
    sigma: np.ndarray[tuple[int], np.dtype[np.float64]], k: int, found: dict[float, float]
) -> None:
    n, count, shares = 384, 100_000 if k == 1 else 40_000, sigma**2 / (sigma**2).sum()
    draw = np.random.default_rng(0)
    if k == 1:  # the first r coordinates of a uniform unit vector
        squares = draw.standard_normal((count, len(sigma))) ** 2
        leaked = squares @ shares / (squares.sum(1) + draw.chisquare(n - len(sigma), count))
    else:
        leaked = (random_block(n, k, len(sigma), count, draw=draw) ** 2).sum(1) @ shares
    variance = energy_share_variance(n, torch.tensor(float(k)), torch.tensor((shares**2).sum())).item()
    columns = {"metric": "leakage", "task_a": "protected", "task_b": "b", "layer": "total", "chance_shape": np.nan}
    rows = pd.DataFrame({"value": leaked, "chance": k / n, "chance_std": variance**0.5} | columns)
    p = against_chance(rows)["p"]
    for level, share in found.items():
        # five standard errors of a share of these draws, and the rounding of the numbers that we say
        slack = 5 * (share / count) ** 0.5 + 0.05 * share
        assert (p < level).mean() == pytest.approx(share, abs=slack), level


def test_updates_that_share_directions_stand_out() -> None:
    adapters = random_set(4, layers=12)
    first = {layer: adapters.factors("a", layer) for layer in adapters.layers}
    same = AdapterSet.from_factors({"a": first, "b": {layer: (-left, right) for layer, (left, right) in first.items()}})
    table = against_chance(interference_table(same))
    single = table[table["layer"] != "total"]
    for metric in ("input_overlap", "output_overlap", "alignment", "backward"):
        assert single[single["metric"] == metric]["p_holm"].max() < 1e-6, metric


def test_p_values_of_cosines_lie_between_the_laws_of_products_and_of_normal_numbers() -> None:
    """Rank one: a product of two normal numbers, P(|xy| > 3) = 0.0196; spread energy: a normal number."""
    assert float(alignment_p_value(3.0, 0.5)) == pytest.approx(0.0196, abs=2e-4)  # Monte Carlo with 10^7 draws
    assert float(alignment_p_value(3.0, 1e7)) == pytest.approx(0.0026998, rel=1e-3)
    assert alignment_p_value([0.0, -1.0, 1.0], 2.0).tolist()[0] == pytest.approx(1.0, abs=1e-9)
    assert alignment_p_value(-1.0, 2.0) == alignment_p_value(1.0, 2.0)


def test_holm_against_the_slow_rule() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        p = draw.random(7) ** 3
        slow = [max(min(1.0, (7 - rank) * q) for rank, q in enumerate(np.sort(p)) if q <= mine) for mine in p]
        np.testing.assert_allclose(holm(p), slow, rtol=1e-14)
    assert np.isnan(holm([np.nan, 0.01])[0])
    assert holm([np.nan, 0.01])[1] == 0.01
    with pytest.raises(ValueError, match="p-values lie between 0 and 1"):
        holm([1.5])


def test_a_bootstrap_interval_moves_with_its_values() -> None:
    sample, shift = np.array([0.0, 0.0, 0.0, -55.0]), -9.635106765140655  # resamples tie, but for their rounding
    low, high = bootstrap_interval(sample, samples=500)
    assert bootstrap_interval(sample + shift, samples=500) == pytest.approx((low + shift, high + shift), abs=1e-9)


@pytest.mark.parametrize("exponent", [-1000, -350, 350, 1000])  # cubes of such values under- and overflow
def test_a_bootstrap_interval_of_values_of_any_size_is_scaled(exponent: int) -> None:
    sample = np.array([0.0, 0.0, 1.0, 3.5])
    low, high = bootstrap_interval(sample, samples=500)
    factor = 2.0**exponent
    assert bootstrap_interval(sample * factor, samples=500) == (low * factor, high * factor)


def test_a_statistic_that_no_left_out_value_changes_has_an_interval() -> None:
    low, high = bootstrap_interval([1.0, 2.0, 2.0, 2.0, 3.0], statistic=np.median, samples=500)
    assert 1 <= low <= 2 <= high <= 3
    assert low < high


def test_bootstrap_intervals_cover_and_know_their_limits() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        low, high = bootstrap_interval(draw.standard_normal(20), samples=500)
        hits += low < 0 < high
    assert 48 <= hits <= 60  # 95 % of 60 is 57; fewer than 48 has probability below 1e-5
    assert bootstrap_interval([1.0, 2.0, 4.0], seed=3) == bootstrap_interval([1.0, 2.0, 4.0], seed=3)
    assert np.isnan(bootstrap_interval([1.0, 2.0])).all()
    with pytest.raises(ValueError, match="values contain NaN"):
        bootstrap_interval([1.0, np.nan, 2.0])
    with pytest.raises(ValueError, match="infinity"):
        bootstrap_interval([1.0, np.inf, 2.0])
    with pytest.raises(ValueError, match="level is 95, a number between 0 and 1"):
        bootstrap_interval([1.0, 2.0, 3.0], level=95)


def test_tables_of_several_seeds_become_one_with_intervals() -> None:
    tables = []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        pair = (torch.randn(9, 3, generator=draw), torch.randn(8, 3, generator=draw))
        tables.append(spectrum_table(AdapterSet.from_factors({"a": {"h.0.q": pair, "head": pair}})))
    found = over_seeds(tables, samples=200)
    assert len(found) == len(tables[0])
    row = found[(found["metric"] == "stable_rank") & (found["layer"] == "h.0.q") & (found["update"] == "task")]
    values = [
        t[(t["metric"] == "stable_rank") & (t["layer"] == "h.0.q") & (t["update"] == "task")]["value"].item()
        for t in tables
    ]
    assert row["value"].item() == pytest.approx(np.mean(values), rel=1e-12)
    assert min(values) <= row["ci_low"].item() < row["value"].item() < row["ci_high"].item() <= max(values)
    assert row["seeds"].item() == 4
    with pytest.raises(ValueError, match="got 1 tables: an interval over seeds needs at least two"):
        over_seeds(tables[:1])
    with pytest.raises(ValueError, match="the tables differ in their rows"):
        over_seeds([tables[0], tables[1][:-1]])


def test_an_infinite_condition_number_is_an_infinite_mean_without_interval() -> None:
    pair = (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    table = spectrum_table(AdapterSet.from_factors({"a": {"x": pair}}))
    found = over_seeds([table] * 3).set_index(["metric", "update"])
    assert found.loc[("condition", "task"), ["value", "seeds"]].tolist() == [np.inf, 3]
    assert found.loc[("condition", "task"), ["ci_low", "ci_high"]].isna().all()
    assert found.loc[("frobenius", "task"), ["value", "ci_low", "ci_high"]].tolist() == [2.0] * 3


def test_permutations_find_an_effect_and_do_not_invent_one_between_groups() -> None:
    draw = np.random.default_rng(0)
    x = draw.random(24)
    groups = np.repeat(["a", "b", "c"], 8)
    found = permutation_test(x, 3 * x + 0.1 * draw.random(24), groups=groups, samples=999)
    assert found.p_value == 0.001  # as small as 999 shuffles can say
    assert found.low < 0 < found.high < found.statistic
    apart = np.repeat([0.0, 5.0, 9.0], 8)
    innocent = permutation_test(draw.random(24) + apart, draw.random(24) + apart, groups=groups, samples=999)
    assert innocent.p_value > 0.05  # the difference between groups is no evidence
    assert permutation_test(draw.random(24) + apart, draw.random(24) + apart, samples=999).p_value < 0.01


def test_permutation_p_values_are_flat_when_nothing_is_there() -> None:
    draw = np.random.default_rng(1)
    found = [
        permutation_test(draw.random(10), draw.random(10), method="pearson", samples=99, seed=i).p_value
        for i in range(200)
    ]
    assert np.mean(np.array(found) <= 0.2) == pytest.approx(0.2, abs=5 * (0.16 / 200) ** 0.5)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths differ: 4 and 3 values, 4 groups"):
        permutation_test([1, 2, 3, 4], [1, 2, 3])
    with pytest.raises(ValueError, match="at least four pairs without NaN, got 3"):
        permutation_test([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="does not vary within any group"):
        permutation_test([1, 1, 1, 1], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="method is 'kendall', choose"):
        permutation_test(range(5), range(5), method="kendall")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="infinite, which has no Pearson correlation: choose method='spearman'"):
        permutation_test([1, 2, 3, np.inf], [1, 2, 3, 4], method="pearson")
    assert permutation_test([1, 2, 3, np.inf], [1, 2, 3, 4], samples=99).statistic == pytest.approx(1)


def test_nothing_warns_where_numbers_are_at_their_limits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = (torch.eye(4)[:, :2], torch.eye(4))  # the whole input space
        table = interference_table(AdapterSet.from_factors({t: {"x": (pair[1], pair[1])} for t in "ab"}))
        found = against_chance(table)
    assert isinstance(found, pd.DataFrame)
    assert found[found["metric"] == "input_overlap"]["value"].tolist() == pytest.approx([1.0, 1.0])


def test_imbalance_stands_beside_what_was_forgotten(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    accuracy = {"accuracy": [[70.0, 41.0, 31.0], [65.0, 80.0, 33.0], [60.0, 75.0, 90.0]]}
    run = write_run(tmp_path / "run", accuracy=accuracy)
    table = imbalance_table({"ours": run})
    assert table[["run", "task", "forgetting"]].to_numpy().tolist() == [["ours", "news", 10.0], ["ours", "nouns", 5.0]]
    spectra = spectrum_table(AdapterSet.load(run))
    own = spectra[(spectra["update"] == "task") & (spectra["metric"] == "entropy_energy_normalized")]
    expected = 1 - own[own["task"] == "news"]["value"].mean()
    assert table["imbalance"][0] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no metric 'beauty' in the spectra of"):
        imbalance_table({"ours": run}, metric="beauty")
    with pytest.raises(ValueError, match="is not complete: forgetting is measured at the end of a run"):
        imbalance_table({"ours": write_run(tmp_path / "half", status="running")})


def test_equal_losses_of_points_are_equal_numbers(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    accuracy = {"accuracy": [[70.3, 41.0, 31.0], [65.0, 80.1, 33.0], [60.1, 69.9, 90.0]]}
    assert 70.3 - 60.1 != 80.1 - 69.9  # both are 10.2, and ranks would tell them apart
    run = write_run(tmp_path / "run", accuracy=accuracy)
    assert imbalance_table({"ours": run})["forgetting"].tolist() == [10.2, 10.2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_interference() -> None:
    adapters = random_set(4, layers=3)
    pd.testing.assert_frame_equal(interference_table(adapters, "cuda"), interference_table(adapters), rtol=1e-7)
