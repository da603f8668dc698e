"""Laws of the diagnostics: bounds, invariances, symmetry, and interventions that keep what they promise."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from property_cases import holds_for
from torch import Tensor

import analysis
from analysis import AdapterSet
from analysis.adapters import merged
from analysis.numerics import spectral_measures as measures
from analysis.statistics.nulls import OverlapNull, holm

spectra = st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 0.5, 1.0, 3.0, 1e6]), min_size=1, max_size=12).filter(any)
positive = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)
scales = st.sampled_from([1e-150, 1e-6, 1.0, 7.0, 1e8, 1e150])
SCALE_FREE = (
    measures.spectral_entropy,
    measures.effective_rank,
    measures.participation_ratio,
    measures.stable_rank,
    measures.spectral_flatness,
    measures.gini,
    measures.condition_number,
)


@dataclass(frozen=True)
class Updates:
    """Sizes and seed of a set of updates: shapes (m, n) with rank r, also above m or n, with every kind of spectrum."""

    m: int
    n: int
    ranks: tuple[int, ...]
    kind: str
    size: float
    seed: int

    def factors(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        draw = torch.Generator().manual_seed(self.seed)
        made: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for task, r in zip("abcd", self.ranks, strict=False):
            made[task] = {}
            for layer in ("h.0.q", "h.1.q"):
                left, right = torch.randn(self.m, r, generator=draw), torch.randn(self.n, r, generator=draw)
                if self.kind == "steep":
                    left = left * torch.logspace(0, -3, r)
                if self.kind == "balanced":
                    left, right = (torch.linalg.qr(x)[0] for x in (left, right))
                made[task][layer] = (self.size * left, right)
        return made

    def loaded(self) -> AdapterSet:
        return AdapterSet.from_factors(self.factors())


@st.composite
def updates(draw: st.DrawFn, tasks: int = 2) -> Updates:
    m, n = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    kind = draw(st.sampled_from(["random", "steep", "balanced"]))
    highest = min(m, n) if kind == "balanced" else 6
    ranks = tuple(draw(st.integers(1, highest)) for _ in range(tasks))
    size = draw(st.sampled_from([1e-6, 1.0, 1e4]))
    return Updates(m, n, ranks, kind, size, draw(st.integers(0, 2**32 - 1)))


def dense(adapters: AdapterSet, task: str, layer: str) -> Tensor:
    left, right = adapters.factors(task, layer)
    return left.double() @ right.double().mT


def spectrum(adapters: AdapterSet, task: str, layer: str) -> np.ndarray[Any, Any]:
    table = analysis.singular_values(adapters)
    chosen = table[(table["task"] == task) & (table["layer"] == layer) & (table["update"] == "task")]
    return chosen["value"].to_numpy()


def values(table: pd.DataFrame, **keys: str) -> pd.Series:
    for column, wanted in keys.items():
        table = table[table[column] == wanted]
    return table.set_index("metric")["value"]


@holds_for(200, sigma=spectra, weights=st.sampled_from(["energy", "singular"]))
def test_entropies_and_ranks_lie_in_their_bounds(sigma, weights):
    r = len(sigma)
    entropy = float(measures.spectral_entropy(sigma, weights=weights))
    assert -1e-12 <= entropy <= math.log(r) + 1e-12
    assert 1 - 1e-12 <= float(measures.effective_rank(sigma, weights=weights)) <= r + 1e-9
    if r > 1:
        assert -1e-12 <= float(measures.spectral_entropy(sigma, weights=weights, normalized=True)) <= 1 + 1e-12
    orders = [float(measures.renyi_entropy(sigma, q, weights=weights)) for q in (0, 0.5, 1, 2, 8, math.inf)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(orders))
    assert 0 <= float(measures.spectral_flatness(sigma)) <= 1 + 1e-12
    assert -1e-12 <= float(measures.gini(sigma)) <= 1 - 1 / r + 1e-12
    shares = [float(measures.top_energy(sigma, k)) for k in range(1, r + 2)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(shares))
    assert all(k / r - 1e-12 <= share <= 1 + 1e-12 for k, share in enumerate(shares[:r], start=1))


@holds_for(200, sigma=positive, scale=scales, seed=st.integers(0, 10**6))
def test_measures_of_spread_depend_on_neither_scale_nor_order(sigma, scale, seed):
    mixed = scale * np.random.default_rng(seed).permutation(sigma)
    for measure in SCALE_FREE:
        assert float(measure(mixed)) == pytest.approx(float(measure(sigma)), rel=1e-9, abs=1e-12)
    if 1e-10 < scale < 1e10:
        assert float(measures.frobenius_norm(mixed)) == pytest.approx(scale * float(measures.frobenius_norm(sigma)))
        assert float(measures.spectral_norm(mixed)) == pytest.approx(scale * max(sigma))


@holds_for(100, sigma=positive, zeros=st.integers(1, 4))
def test_vanishing_values_do_not_change_unnormalised_measures(sigma, zeros):
    longer = [*sigma, *[0.0] * zeros]
    for measure in (measures.spectral_entropy, measures.participation_ratio, measures.stable_rank):
        assert float(measure(longer)) == pytest.approx(float(measure(sigma)), rel=1e-12, abs=1e-12)


@holds_for(100, case=updates(1))
def test_singular_values_are_those_of_the_dense_update(case):
    adapters = case.loaded()
    exact = torch.linalg.svdvals(dense(adapters, "a", "h.0.q")).numpy()
    found = spectrum(adapters, "a", "h.0.q")
    np.testing.assert_allclose(found, exact[: len(found)], rtol=0, atol=1e-12 * exact[0])
    assert (np.diff(found) <= 1e-12 * exact[0]).all()


@holds_for(60, case=updates(1))
def test_a_spectrum_depends_on_the_product_of_the_factors_only(case):
    factors = case.factors()
    left, right = factors["a"]["h.0.q"]
    mix = torch.randn(case.ranks[0], case.ranks[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mix = torch.linalg.qr(mix)[0] * 3
    mixed = (left.double() @ mix, right.double() @ torch.linalg.inv(mix).mT)
    found = spectrum(AdapterSet.from_factors({"a": {"h.0.q": mixed}}), "a", "h.0.q")
    np.testing.assert_allclose(found, spectrum(case.loaded(), "a", "h.0.q"), rtol=0, atol=2e-6 * max(found))


@holds_for(60, case=updates(2))
def test_interference_lies_in_its_bounds_and_is_symmetric_where_promised(case):
    adapters = case.loaded()
    factors = case.factors()
    swapped = AdapterSet.from_factors({"b": factors["b"], "a": factors["a"]})
    for layer in ("h.0.q", "total"):
        forth = values(analysis.interference_table(adapters), layer=layer)
        back = values(analysis.interference_table(swapped), layer=layer)
        for metric in ("input_overlap", "output_overlap", "alignment"):
            assert forth[metric] == pytest.approx(back[metric], abs=1e-9)
        for metric in ("input_overlap", "output_overlap", "backward"):
            assert -1e-12 <= forth[metric] <= 1 + 1e-9
        assert -1 - 1e-9 <= forth["alignment"] <= 1 + 1e-9


@holds_for(40, case=updates(2), factor=st.sampled_from([-3.0, -1.0, 0.01, 100.0]))
def test_interference_depends_on_scale_and_sign_as_promised(case, factor):
    factors = case.factors()
    other = {layer: (factor * left, right) for layer, (left, right) in factors["b"].items()}
    before = values(analysis.interference_table(case.loaded()), layer="h.0.q")
    after = values(analysis.interference_table(AdapterSet.from_factors({"a": factors["a"], "b": other})), layer="h.0.q")
    for metric in ("input_overlap", "output_overlap", "backward"):
        assert after[metric] == pytest.approx(before[metric], abs=1e-5)  # float32 factors
    assert after["alignment"] == pytest.approx(math.copysign(1, factor) * before["alignment"], abs=1e-5)
    assert after["forward_corruption"] == pytest.approx(abs(factor) * before["forward_corruption"], rel=1e-4, abs=1e-9)


@holds_for(40, case=updates(2))
def test_an_update_overlaps_itself_completely(case):
    factors = case.factors()
    twice = AdapterSet.from_factors({"a": factors["a"], "b": factors["a"]})
    found = values(analysis.interference_table(twice), layer="h.0.q")
    for metric in ("input_overlap", "output_overlap", "backward", "alignment", "forward_corruption"):
        assert found[metric] == pytest.approx(1, abs=1e-6)


@holds_for(40, case=updates(2))
def test_principal_angles_are_symmetric_and_in_their_range(case):
    adapters = case.loaded()
    factors = case.factors()
    swapped = AdapterSet.from_factors({"b": factors["b"], "a": factors["a"]})
    forth, back = analysis.principal_angles(adapters), analysis.principal_angles(swapped)
    np.testing.assert_allclose(forth["angle"], back["angle"], atol=1e-6)
    assert forth["angle"].between(0, math.pi / 2 + 1e-12).all()
    np.testing.assert_allclose(np.cos(forth["angle"]), forth["cosine"], atol=1e-7)
    groups = forth.groupby(["layer", "side"])["angle"]
    assert all((np.diff(angles) >= -1e-9).all() for _, angles in groups)
    overlap = values(analysis.interference_table(adapters), layer="h.0.q")["input_overlap"]
    chosen = forth[(forth["layer"] == "h.0.q") & (forth["side"] == "input")]
    assert (chosen["cosine"] ** 2).mean() == pytest.approx(overlap, abs=1e-6)


@holds_for(60, case=updates(2))
def test_energy_shares_of_components_add_up_to_one(case):
    table = analysis.component_table(case.loaded())
    assert table.groupby(["task", "layer"])["energy_share"].sum().to_numpy() == pytest.approx(1, abs=1e-9)


@holds_for(
    40,
    case=updates(1),
    gamma=st.sampled_from([0.0, 0.3, 1.0]),
    norm=st.sampled_from(["frobenius", "spectral", "nuclear"]),
)
def test_flattening_and_sharpening_keep_the_norm_and_move_the_entropy(case, gamma, norm):
    adapters = case.loaded()
    order = {"frobenius": 2, "spectral": math.inf, "nuclear": 1}[norm]
    before = spectrum(adapters, "a", "h.0.q")
    flat, sharp = (
        spectrum(change(adapters, gamma, norm=norm), "a", "h.0.q")
        for change in (analysis.flattened, analysis.sharpened)
    )
    for after in (flat, sharp):
        assert np.linalg.norm(after, order) == pytest.approx(np.linalg.norm(before, order), rel=1e-4)
    entropies = [float(measures.spectral_entropy(sigma)) for sigma in (sharp, before, flat)]
    assert entropies[0] <= entropies[1] + 1e-4 <= entropies[2] + 2e-4


@holds_for(40, case=updates(1), rank=st.integers(1, 8), same=st.booleans())
def test_truncation_keeps_the_leading_part(case, rank, same):
    adapters = case.loaded()
    before, after = (
        spectrum(each, "a", "h.0.q") for each in (adapters, analysis.truncated(adapters, rank, same_norm=same))
    )
    kept = before[: min(rank, len(after))]
    used = after[: len(kept)]
    if same:
        assert np.linalg.norm(used) == pytest.approx(np.linalg.norm(before), rel=1e-5)
    else:
        np.testing.assert_allclose(used, kept, rtol=0, atol=2e-6 * before[0])
    assert (after[rank:] <= 1e-6 * before[0]).all()


@holds_for(40, case=updates(1), k=st.integers(0, 9), gamma=st.sampled_from([0.0, 0.5, 1.0]))
def test_projecting_off_takes_the_update_off_the_protected_inputs(case, k, gamma):
    draw = torch.Generator().manual_seed(case.seed + 1)
    basis = torch.linalg.qr(torch.randn(case.n, min(k, case.n), dtype=torch.float64, generator=draw))[0]
    adapters = case.loaded()
    changed = analysis.projected_off(adapters, {"h.0.q": basis}, gamma)
    before, after = dense(adapters, "a", "h.0.q"), dense(changed, "a", "h.0.q")
    expected = before - gamma * (before @ basis) @ basis.mT
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5 * max(float(before.abs().max()), 1e-12) * 10)
    for kept, given in zip(changed.factors("a", "h.1.q"), adapters.factors("a", "h.1.q"), strict=True):
        assert torch.equal(kept, given)  # their product may differ by rounding, which depends on the memory layout


@holds_for(40, case=updates(1), k=st.integers(1, 5), gamma=st.sampled_from([0.0, 0.5, 1.0]), into=st.booleans())
def test_rotations_keep_the_spectrum_and_move_the_inputs(case, k, gamma, into):
    case = replace(case, n=case.n + 12)  # room for ranks up to 6 outside 5 directions
    draw = torch.Generator().manual_seed(case.seed + 1)
    basis = torch.linalg.qr(torch.randn(case.n, k, dtype=torch.float64, generator=draw))[0]
    adapters = case.loaded()
    change = analysis.rotated_into if into else analysis.rotated_away
    changed = change(adapters, {"h.0.q": basis}, gamma)
    before, after = (spectrum(each, "a", "h.0.q") for each in (adapters, changed))
    r = min(len(before), len(after))
    np.testing.assert_allclose(after[:r], before[:r], rtol=0, atol=3e-6 * before[0])
    update = dense(changed, "a", "h.0.q")
    if gamma == 1.0 and not into:
        assert float((update @ basis).norm()) <= 1e-5 * float(update.norm())


@holds_for(40, case=updates(1), factor=st.sampled_from([1e-3, 0.5, 20.0]))
def test_scaling_and_levelling_change_sizes_only(case, factor):
    adapters = case.loaded()
    larger = analysis.scaled(adapters, factor)
    expected = factor * dense(adapters, "a", "h.0.q")
    left, right = adapters.factors("a", "h.0.q")
    sizes = factor * left.double().abs() @ right.double().abs().mT  # of the terms of each sum
    assert bool(((dense(larger, "a", "h.0.q") - expected).abs() <= 1e-6 * sizes).all())
    level = analysis.levelled(adapters)
    norms = [float(dense(level, "a", layer).norm()) for layer in ("h.0.q", "h.1.q")]
    total = [float(dense(adapters, "a", layer).norm()) for layer in ("h.0.q", "h.1.q")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert math.hypot(*norms) == pytest.approx(math.hypot(*total), rel=1e-5)


@holds_for(40, case=updates(1), side=st.sampled_from(["input", "output", "both"]), seed=st.integers(0, 99))
def test_random_directions_keep_the_spectrum(case, side, seed):
    adapters = case.loaded()
    changed = analysis.redirected(adapters, side=side, seed=seed)
    before, after = (spectrum(each, "a", "h.0.q") for each in (adapters, changed))
    r = min(len(before), len(after))
    np.testing.assert_allclose(after[:r], before[:r], rtol=0, atol=3e-6 * before[0])


@holds_for(40, case=updates(2), a=st.sampled_from([-1.0, 0.5, 2.0]), b=st.sampled_from([0.0, 1.0, -0.25]))
def test_a_weighted_merge_is_the_weighted_sum(case, a, b):
    adapters = case.loaded()
    found = merged(adapters, {"sum": {"a": a, "b": b}}).adapters
    expected = a * dense(adapters, "a", "h.0.q") + b * dense(adapters, "b", "h.0.q")
    size = max(float(dense(adapters, task, "h.0.q").abs().max()) for task in "ab")
    torch.testing.assert_close(dense(found, "sum", "h.0.q"), expected, rtol=0, atol=2e-5 * size)


@holds_for(40, case=updates(1), keep=st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]))
def test_a_suggested_rank_keeps_its_share_and_is_the_smallest(case, keep):
    adapters = case.loaded()
    suggestion = analysis.suggest_ranks(adapters, keep)
    sigma = spectrum(adapters, "a", "h.0.q") ** 2
    rank = suggestion.ranks["a"]["h.0.q"]
    shares = np.cumsum(sigma) / sigma.sum()
    assert shares[min(rank, len(shares)) - 1] >= keep - 1e-9
    assert rank == 1 or shares[rank - 2] < keep + 1e-9
    more = analysis.suggest_ranks(adapters, (1 + keep) / 2).ranks["a"]["h.0.q"]
    assert more >= rank
    assert suggestion.compressed().shape("a", "h.0.q")[2] == rank


@holds_for(60, case=updates(1), wrong=st.sampled_from(["nan", "inf", "rank", "flat", "gamma", "zero"]))
def test_wrong_updates_are_refused(case, wrong):
    left, right = case.factors()["a"]["h.0.q"]
    if wrong in ("nan", "inf"):
        left = left.clone()
        left[0, 0] = float(wrong)
        with pytest.raises(ValueError, match="a, x: factors contain NaN or infinite"):
            AdapterSet.from_factors({"a": {"x": (left, right)}})
    elif wrong == "rank":
        with pytest.raises(ValueError, match="a, x: factors need shapes"):
            AdapterSet.from_factors({"a": {"x": (left, torch.cat([right, right], dim=1))}})
    elif wrong == "flat":
        with pytest.raises(ValueError, match="a, x: factors need shapes"):
            AdapterSet.from_factors({"a": {"x": (left[:, 0], right)}})
    elif wrong == "gamma":
        with pytest.raises(ValueError, match=r"gamma is 1\.5"):
            analysis.flattened(case.loaded(), 1.5)
    else:
        zero = AdapterSet.from_factors({"a": {"x": (0 * left, right)}})
        with pytest.raises(ValueError, match="updates are zero"):
            analysis.spectrum_table(zero)
        with pytest.raises(ValueError, match="a, x: the update is zero"):
            analysis.flattened(zero, 0.5)


@holds_for(200, p=st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=15), seed=st.integers(0, 999))
def test_holm_is_monotone_and_does_not_depend_on_order(p, seed):
    adjusted = holm(p)
    known = ~np.isnan(p) if p else np.zeros(0, dtype=bool)
    given = np.asarray(p, dtype=float)
    assert (np.isnan(adjusted) == ~known).all()
    assert ((adjusted[known] >= given[known]) & (adjusted[known] <= 1)).all()
    assert (adjusted[known] <= np.minimum(given[known] * max(known.sum(), 1), 1) + 1e-15).all()  # Bonferroni's
    order = np.argsort(given[known], kind="stable")
    assert (np.diff(adjusted[known][order]) >= 0).all()
    mix = np.random.default_rng(seed).permutation(len(p))
    np.testing.assert_allclose(holm(given[mix]), adjusted[mix], rtol=1e-15)


@holds_for(200, n=st.integers(1, 40), a=st.integers(1, 40), b=st.integers(1, 40))
def test_the_null_law_of_an_overlap_is_a_law(n, a, b):
    if max(a, b) > n:
        with pytest.raises(ValueError, match=f"between 1 and n = {n}"):
            OverlapNull(n, a, b)
        return
    law, other = OverlapNull(n, a, b), OverlapNull(n, b, a)
    assert (law.mean, law.std) == pytest.approx((other.mean, other.std))
    assert 0 < law.mean <= 1
    quantiles = law.quantile([0.01, 0.5, 0.99])
    assert (np.diff(quantiles) >= 0).all()
    assert ((quantiles >= -1e-12) & (quantiles <= 1 + 1e-12)).all()
    tails = law.p_value(np.linspace(0, 1, 6))
    assert (np.diff(tails) <= 1e-12).all()
    assert ((tails >= 0) & (tails <= 1)).all()


# On a grid: values that differ by less than their rounding after the shift become equal, and equal ones are counted.
@holds_for(
    30, sample=st.lists(st.integers(-400, 400).map(lambda v: v / 4), min_size=3, max_size=8), shift=st.floats(-10, 10)
)
def test_a_bootstrap_interval_holds_the_range_of_means_and_moves_with_the_data(sample, shift):
    low, high = analysis.bootstrap_interval(sample, samples=500)
    assert min(sample) - 1e-9 <= low <= high <= max(sample) + 1e-9
    moved = analysis.bootstrap_interval([value + shift for value in sample], samples=500)
    spread = max(sample) - min(sample)
    if spread > 1e-3:
        assert moved == pytest.approx((low + shift, high + shift), abs=1e-6 * (1 + spread))


@holds_for(30, seed=st.integers(0, 10**6), count=st.integers(4, 12))
def test_a_permutation_test_is_symmetric_and_bounded(seed, count):
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=count), draw.normal(size=count)
    found, other = analysis.permutation_test(x, y, samples=199), analysis.permutation_test(-3 * x + 1, y, samples=199)
    assert -1 <= found.statistic <= 1
    assert 1 / 200 <= found.p_value <= 1
    assert other.statistic == pytest.approx(-found.statistic, abs=1e-9)
    assert found.p_value == pytest.approx(other.p_value)
