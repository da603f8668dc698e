"""Suggested ranks keep what they state, and compressed adapters are what the ranks say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from analysis import AdapterSet, change_table, suggest_ranks
from analysis.activations import InputMoments, input_moments
from analysis.changes import compressed, write_changed
from analysis.statistics.prediction import _student_factor, share_prediction


def random_set(seed: int, ranks: tuple[int, ...] = (4, 6), m: int = 12, n: int = 10) -> AdapterSet:
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for index, rank in enumerate(ranks):
        sizes = torch.logspace(0, -1.5, rank)
        layers[f"h.{index}"] = (torch.randn(m, rank, generator=draw) * sizes, torch.randn(n, rank, generator=draw))
    return AdapterSet.from_factors({"a": layers})


def dense(adapters: AdapterSet, layer: str) -> Tensor:
    left, right = adapters.factors(adapters.tasks[0], layer)
    return left.double() @ right.double().T


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_every_layer_keeps_the_energy_and_one_rank_less_would_not(seed: int, keep: float) -> None:
    adapters = random_set(seed)
    found = suggest_ranks(adapters, keep)
    after = found.compressed()
    for layer, rank in found.ranks["a"].items():
        values = torch.linalg.svdvals(dense(adapters, layer)).square()
        shares = values.cumsum(0) / values.sum()
        assert shares[rank - 1] >= keep - 1e-12  # rounding of the sums
        assert rank == 1 or shares[rank - 2] < keep
        assert after.shape("a", layer)[2] == rank
        lost = (dense(after, layer) - dense(adapters, layer)).square().sum() / values.sum()
        assert 1 - float(lost) == pytest.approx(float(shares[rank - 1]), abs=1e-6)  # float32 factors
    uniform = found.compressed(uniform=True)
    for layer in uniform.layers:
        assert uniform.shape("a", layer)[2] == min(adapters.shape("a", layer)[2], found.uniform_rank)
    assert found.uniform_rank == max(found.ranks["a"].values())


class Model(nn.Module):
    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(width, 12), nn.Linear(width, 12)])

    def forward(self, x: Tensor) -> Tensor:
        return self.h[0](x) + self.h[1](x.flip(-1))


def inputs(seed: int, examples: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2.0, 0.05, 10)
    mean = torch.randn(examples, 1, 10, generator=draw)
    return list(((mean + torch.randn(examples, 5, 10, generator=draw)) * scale).split(8))


def drift_kept(adapters: AdapterSet, after: AdapterSet, layer: str, x: Tensor) -> float:
    """Densely: 1 − Σ‖(ΔW − ΔW')x‖² / Σ‖ΔW x‖²."""
    before = dense(adapters, layer)
    change = before - dense(after, layer)
    return 1.0 - float((x @ change.T).square().sum() / (x @ before.T).square().sum())


def moments_of(adapters: AdapterSet, batches: list[Tensor], groups: int = 32) -> InputMoments:
    return input_moments(Model(), adapters, batches, groups=groups)


def test_drift_is_kept_as_a_dense_computation_says_with_fewer_ranks_than_energy_needs() -> None:
    adapters, batches = random_set(3), inputs(0, 64)
    found = suggest_ranks(adapters, 0.9, moments=moments_of(adapters, batches), samples=200)
    assert found.criterion == "drift"
    after = found.compressed()
    x = torch.cat(batches).reshape(-1, 10).double()
    by_layer = {"h.0": x, "h.1": x.flip(-1)}
    for row in found.table.itertuples():
        kept = drift_kept(adapters, after, row.layer, by_layer[row.layer])
        assert kept >= row.ci_low >= 0.9  # the data that chose the directions keep more than new ones
        leading = compressed(adapters, {"a": {row.layer: row.rank}})
        assert kept >= drift_kept(adapters, leading, row.layer, by_layer[row.layer]) - 1e-9
    assert (found.curve["ci_low"] <= found.curve["kept"]).all()
    assert (found.curve["kept"] <= found.curve["ci_high"]).all()
    assert found.curve.groupby("layer")["kept"].last().tolist() == [1.0, 1.0]


def test_the_lower_end_chooses_the_rank_and_directions_are_those_of_other_examples() -> None:
    adapters = random_set(3, ranks=(6, 6))
    moments = moments_of(adapters, inputs(0, 16))
    found = suggest_ranks(adapters, 0.9, moments=moments, samples=200)
    row = found.curve[found.curve["layer"] == "h.0"].iloc[1]
    assert row["ci_low"] < row["kept"]
    between = suggest_ranks(adapters, (row["ci_low"] + row["kept"]) / 2, moments=moments, samples=200)
    assert between.ranks["a"]["h.0"] == 3  # rank 2 keeps the share, the lower end of its interval does not
    for layer in adapters.layers:
        left = adapters.factors("a", layer)[0].double()
        core = torch.linalg.qr(left).R
        energies = torch.linalg.eigvalsh((core @ moments.block(layer, "a") @ core.mT).sum(0)).flip(0)
        same = (energies.cumsum(0) / energies.sum()).numpy()
        other = found.curve.loc[found.curve["layer"] == layer, "kept"].to_numpy()
        assert (other[:-1] < same[:-1] - 1e-6).any()  # directions of the same examples would keep more
        assert (other <= same + 1e-6).all()


def test_heavy_tails_widen_the_interval() -> None:
    heavy, light = np.ones((40, 1)), np.ones((40, 1))
    heavy[0], light[::2] = 1 + 40**0.5, 2.0  # about equal variances
    widths = []
    for part in (heavy, light):
        centred = part - part.mean()
        widths.append(float(_student_factor(centred, 0.95)[0]))
    assert widths[0] > 1.3 * widths[1] > 1.3


def test_new_batches_keep_the_share_within_the_interval() -> None:
    """At the default level of 0.98, at least 95 % of layers and draws; the benchmark measures a real model."""
    inside, above = [], []
    for seed in range(12):
        adapters = random_set(seed, ranks=(6, 6))
        found = suggest_ranks(adapters, 0.9, moments=moments_of(adapters, inputs(seed, 64)), samples=400)
        after = found.compressed()
        x = torch.cat(inputs(1000 + seed, 64)).reshape(-1, 10).double()
        for row in found.table.itertuples():
            kept = drift_kept(adapters, after, row.layer, x if row.layer == "h.0" else x.flip(-1))
            inside.append(row.ci_low <= kept <= row.ci_high)
            above.append(kept >= 0.9)
    assert np.mean(inside) >= 0.95
    assert np.mean(above) >= 0.95


def test_a_prediction_interval_covers_new_means_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        old, new = draw.gamma(2.0, size=(2, 40, 1))
        _, low, high = share_prediction(old, np.full(40, 10.0), level=0.9, samples=400, seed=trial)
        hits += low[0] <= new.sum() / 400.0 <= high[0]
    assert 0.84 <= hits / 200 <= 0.96  # 0.9 ± 3 standard errors


def test_zero_updates_and_layers_that_stay() -> None:
    left, right = torch.randn(12, 3), torch.randn(10, 3)
    layers = {"h.0": (torch.zeros(12, 3), right), "h.1": (left, right)}
    adapters = AdapterSet.from_factors({"a": layers})
    found = suggest_ranks(adapters, 0.99)
    assert found.ranks["a"]["h.0"] == 1
    assert found.compressed().shape("a", "h.0") == (12, 10, 1)
    only = suggest_ranks(adapters, 0.5, layers=["h.1"])
    assert list(only.table["layer"]) == ["h.1"]
    assert only.compressed().shape("a", "h.0") == (12, 10, 3)


@pytest.mark.parametrize("keep", [0.0, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=f"keep is {keep}"):
        suggest_ranks(random_set(0), keep)


def test_too_few_examples_for_an_interval_are_refused() -> None:
    adapters = random_set(0)
    with pytest.raises(ValueError, match="5 groups of examples are too few for an interval: at least 8"):
        suggest_ranks(adapters, moments=moments_of(adapters, inputs(0, 5)))
    with pytest.raises(ValueError, match="no layer is left to compress"):
        suggest_ranks(adapters, layers=[])


def test_the_table_of_changes_is_that_of_dense_matrices() -> None:
    before = random_set(1)
    after = suggest_ranks(before, 0.8).compressed()
    basis = torch.linalg.qr(torch.randn(10, 3, generator=torch.Generator().manual_seed(5))).Q
    table = change_table(before, after, protected={"h.0": basis}).set_index(["layer", "metric"])
    pairs = {layer: (dense(before, layer), dense(after, layer)) for layer in before.layers}
    for layer, (a, b) in pairs.items():
        rows = table.loc[layer]
        assert rows.loc["frobenius"][["before", "after"]].tolist() == pytest.approx([a.norm().item(), b.norm().item()])
        assert rows["after"]["relative_change"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
        assert rows["after"]["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-9)
        assert rows["after"]["rank"] == after.shape("a", layer)[2]
    leaked = [float((matrix @ basis.double()).square().sum() / matrix.square().sum()) for matrix in pairs["h.0"]]
    assert table.loc[("h.0", "leakage"), ["before", "after"]].tolist() == pytest.approx(leaked, rel=1e-6)
    assert ("h.1", "leakage") not in table.index
    joined = [torch.cat([pair[side].flatten() for pair in pairs.values()]) for side in (0, 1)]
    total = table.loc["total"]["after"]
    assert total["relative_change"] == pytest.approx(float((joined[0] - joined[1]).norm() / joined[0].norm()), rel=1e-6)
    assert total["rank"] == sum(after.shape("a", layer)[2] for layer in after.layers)
    with pytest.raises(ValueError, match="different tasks or layers"):
        change_table(before, random_set(1, ranks=(4,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_adapter_loads_in_peft_and_keeps_a_trained_head(tmp_path: Path, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")

    class Headed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(x))

    torch.manual_seed(0)
    base = Headed()
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"], modules_to_save=["head"], use_rslora=True)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "ad")
    x = torch.randn(7, 10)
    expected = model(x)
    before = AdapterSet.load(tmp_path / "ad")
    found = suggest_ranks(before, 1.0)  # nothing is lost, and ranks are written anew
    written = write_changed(tmp_path / "new", before, found.compressed(), dtype=dtype)
    fresh = Headed()
    fresh.load_state_dict(kept)
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "new"))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # 2⁻⁸ per factor of bfloat16
    torch.testing.assert_close(loaded(x), expected, rtol=tolerance, atol=tolerance)
    assert written.tasks == before.tasks
    ranks = {"h.0": 1, "h.1": 3}
    write_changed(tmp_path / "ranks", before, compressed(before, {"ad": ranks}))
    again = Headed()
    again.load_state_dict(kept)
    model = peft.PeftModel.from_pretrained(again, str(tmp_path / "ranks"))
    assert [model.base_model.model.h[i].r["default"] for i in (0, 1)] == [1, 3]
    assert torch.equal(model.base_model.model.head.weight, loaded.base_model.model.head.weight)
