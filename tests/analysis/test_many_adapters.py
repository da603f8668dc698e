"""Collections of many adapters against slow twins in float64, with members that cannot be read, and in blocks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from analysis import AdapterCollection, AdapterSet, interference_table
from analysis.formats import save_lora
from analysis.many import CollectionTables, collection, layer_pass
from analysis.many.clusters import cluster_tree
from analysis.numerics.decomposition import tall_frames, triples
from analysis.plots import plot_common_directions, plot_dendrogram
from analysis.report import write_many_report
from analysis.statistics import outlier_p_values

Factors = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
LAYERS = {"h.0.q": (12, 30), "h.0.mlp": (40, 30), "h.1.q": (12, 30), "h.1.down": (30, 44)}


def members(count: int = 9, *, families: int = 3, common: float = 1.5, seed: int = 0) -> dict[str, Factors]:
    """Members of ranks 2 and 3; those of a family share a part of their inputs."""
    draw = torch.Generator().manual_seed(seed)
    shared = {layer: [torch.randn(n, 3, generator=draw) for _ in range(families)] for layer, (_, n) in LAYERS.items()}
    found: dict[str, Factors] = {}
    for number in range(count):
        rank = 2 + number % 2
        found[f"member-{number}"] = {
            layer: (
                torch.randn(m, rank, generator=draw),
                torch.randn(n, rank, generator=draw) + common * shared[layer][number % families][:, :rank],
            )
            for layer, (m, n) in LAYERS.items()
        }
    return found


def write(folder: Path, factors: Factors) -> Path:
    """One PEFT folder per member."""
    updates = [(name, ((name, layer, *pair) for layer, pair in layers.items())) for name, layers in factors.items()]
    save_lora(folder, updates)
    (folder / "tasks.json").unlink()
    for place in list(folder.iterdir()):
        place.rename(folder / place.name.partition("-")[2])
    return folder


def exact_overlaps(factors: Factors, side: str = "input") -> np.ndarray:
    """Totals of `interference_table`, which decomposes all members together by Householder's QR."""
    table = interference_table(AdapterSet.from_factors(factors))
    rows = table[(table["metric"] == f"{side}_overlap") & (table["layer"] == "total")].set_index(["task_a", "task_b"])
    names = list(factors)
    grid = np.eye(len(names))
    for (a, b), value in rows["value"].items():
        grid[names.index(a), names.index(b)] = grid[names.index(b), names.index(a)] = value
    return grid


@pytest.mark.parametrize("side", ["input", "output"])
def test_overlaps_and_their_chance_are_those_of_the_interference_table(side: str) -> None:
    factors = members()
    tables = AdapterCollection.from_factors(factors).measure(side=side)  # type: ignore[arg-type]
    # products of frames are in float32
    assert tables.overlap == pytest.approx(exact_overlaps(factors, side), rel=1e-5)
    table = interference_table(AdapterSet.from_factors(factors))
    rows = table[(table["metric"] == f"{side}_overlap") & (table["layer"] == "total")]
    rows = rows.sort_values(["task_a", "task_b"])
    ours = tables.pairs.sort_values(["member_a", "member_b"])
    for column in ("chance", "chance_std"):
        assert ours[column].to_numpy() == pytest.approx(rows[column].to_numpy(), rel=1e-9)
    assert (ours["p_holm"] >= ours["p"]).all()


def test_common_directions_are_those_of_the_dense_sum_of_projectors() -> None:
    factors = members()
    tables = AdapterCollection.from_factors(factors).measure(curves=len(LAYERS))
    for layer in LAYERS:
        total = 0.0
        for layers in factors.values():
            left, right = (factor.double() for factor in layers[layer])
            _, sigma, vt = torch.linalg.svd(left @ right.mT, full_matrices=False)
            share = sigma.square() / sigma.square().sum()
            total = total + (vt.mT * share) @ vt
        energy = torch.linalg.eigvalsh(total).flip(0).cumsum(0) / len(factors)
        rows = tables.curves[tables.curves["layer"] == layer]
        assert rows["share"].to_numpy() == pytest.approx(energy[rows["directions"].to_numpy() - 1].numpy(), rel=1e-5)
        needed = int((energy < 0.9).sum()) + 1
        assert tables.layers.set_index("layer").loc[layer, "directions_0.9"] == needed


def test_random_members_need_more_common_directions_than_related_ones() -> None:
    related = AdapterCollection.from_factors(members(30)).measure().layers
    unrelated = AdapterCollection.from_factors(members(30, common=0.0)).measure().layers
    assert (related["directions_0.5"] < related["random_0.5"]).all()
    assert (unrelated["directions_0.5"] - unrelated["random_0.5"]).abs().max() <= 1


def test_spectra_are_those_of_each_member() -> None:
    factors = members(4)
    rows = AdapterCollection.from_factors(factors).measure().members.set_index("member")
    for name, layers in factors.items():
        dense = [torch.linalg.svdvals((left @ right.mT).double()) for left, right in layers.values()]
        assert rows.loc[name, "frobenius"] == pytest.approx(sum(float(s.square().sum()) for s in dense) ** 0.5)
        top = [float(s[0] ** 2 / s.square().sum()) for s in dense]
        assert rows.loc[name, "top1_energy"] == pytest.approx(sum(top) / len(top))


@pytest.mark.parametrize("condition", [1.0, 1e-6])
def test_tall_frames_keep_the_digits_of_householders_triples(condition: float) -> None:
    """Nearly dependent columns leave the Gram matrix for Householder's QR."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, size, 4, generator=draw, dtype=torch.float64) for size in (20, 30))
    right[..., 3] = right[..., 2] + condition * right[..., 3]
    frames, values, rank = tall_frames(left.mT, right.mT)
    exact = triples(left, right)
    assert values.numpy() == pytest.approx(exact.values.numpy(), rel=1e-8)
    assert frames.mT.abs().numpy() == pytest.approx(exact.right.abs().numpy(), abs=1e-6)
    assert torch.equal(rank, exact.rank)


def test_blocks_of_members_give_the_numbers_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    given = AdapterCollection.from_factors(members())
    whole = given.measure()
    monkeypatch.setattr(collection, "LEAST_BLOCK", 4 * 30 * 8)  # columns for two or three members
    blocked = given.measure(memory_budget=1)
    assert blocked.overlap == pytest.approx(whole.overlap, rel=1e-6)
    assert blocked.members["frobenius"].tolist() == whole.members["frobenius"].tolist()
    assert len(whole.curves) > 0 == len(blocked.curves)


def same(ours: CollectionTables, expected: CollectionTables) -> None:
    assert ours.names == expected.names
    assert ours.overlap == pytest.approx(expected.overlap, rel=1e-6)
    pd.testing.assert_frame_equal(ours.curves, expected.curves)
    pd.testing.assert_frame_equal(ours.members, expected.members)


@pytest.mark.slow
def test_tiles_of_the_products_give_the_overlaps_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    collection_of = AdapterCollection.from_factors(members())
    expected = collection_of.measure().overlap
    monkeypatch.setattr(layer_pass, "TILE", 5)
    np.testing.assert_allclose(collection_of.measure().overlap, expected, atol=1e-6)
    np.testing.assert_allclose(expected, expected.T)


@pytest.mark.slow
def test_several_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    factors = members(5)
    folder = write(tmp_path / "members", factors)
    file = folder / "member-3" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.h.1.q.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    given = AdapterCollection.load(folder)
    there, here = given.measure(processes=2), given.measure()
    same(there, here)
    assert [each.name for each in there.left_out] == ["member-3"]


def test_members_that_cannot_be_read_are_named_and_the_others_measured(tmp_path: Path) -> None:
    factors = members(6)
    folder = write(tmp_path / "members", factors)
    (folder / "notes.txt").write_text("not an adapter")
    (folder / "empty").mkdir()
    truncated = folder / "member-1" / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:200])
    # found only when the last layer is read, after others were measured with this member
    file = folder / "member-4" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.h.1.q.lora_B.weight"][0, 0] = torch.inf
    save_file(tensors, file)
    found = AdapterCollection.load(folder)
    assert [member.name for member in found.members] == ["member-0", "member-2", "member-3", "member-4", "member-5"]
    tables = found.measure()
    reasons = {each.name: each.reason for each in tables.left_out}
    assert set(reasons) == {"notes.txt", "empty", "member-1", "member-4"}
    assert "truncated" in reasons["member-1"]
    assert "h.1.q.lora_B" in reasons["member-4"]
    good = {name: layers for name, layers in factors.items() if name not in ("member-1", "member-4")}
    same(tables, AdapterCollection.load(write(tmp_path / "good", good)).measure())


def test_members_of_another_model_are_named_or_read_in_part(tmp_path: Path) -> None:
    factors = members(4)
    factors["fewer"] = {layer: pair for layer, pair in factors["member-0"].items() if layer != "h.1.q"}
    factors["other"] = {"h.0.q": (torch.ones(12, 2), torch.ones(31, 2))}
    factors["more"] = {**factors["member-1"], "head": (torch.ones(5, 1), torch.ones(7, 1))}
    folder = write(tmp_path / "members", factors)
    found = AdapterCollection.load(folder)
    assert {each.name for each in found.left_out} == {"fewer", "other"}
    assert "h.1.q" in dict(found.left_out)["fewer"]
    assert any("more" in notice for notice in found.notices)
    partly = AdapterCollection.load(folder, common=True)
    assert {each.name for each in partly.left_out} == {"other"}
    assert set(partly.layers) == set(LAYERS) - {"h.1.q"}
    assert set(AdapterCollection.load(folder, layers=r"h\.[0]\.").layers) == {"h.0.q", "h.0.mlp"}


def test_names_of_another_version_of_the_model_are_matched() -> None:
    factors = members(4)
    renamed = {f"model.{layer}": pair for layer, pair in factors["member-3"].items()}
    given = AdapterCollection.from_factors({**factors, "member-3": renamed})
    assert given.measure().overlap == pytest.approx(exact_overlaps(factors), rel=1e-5)


def test_fewer_than_two_adapters_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "members", members(2))
    (folder / "member-1" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"members: 1 of 1 adapters.*member-1.*truncated"):
        AdapterCollection.load(folder)
    with pytest.raises(FileNotFoundError, match="no_such"):
        AdapterCollection.load(tmp_path / "no_such")
    given = AdapterCollection.from_factors(members(3))
    with pytest.raises(ValueError, match="side is 'left'"):
        given.measure(side="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processes is 0"):
        given.measure(processes=0)
    with pytest.raises(ValueError, match="curves is -1, a number of layers from 0 on"):
        given.measure(curves=-1)
    with pytest.raises(ValueError, match="clusters is 4, a number from 1 to 3"):
        given.measure(clusters=4)


def test_families_are_clusters_and_random_members_are_in_none() -> None:
    tables = AdapterCollection.from_factors(members(24)).measure()
    labels = tables.members["cluster"].to_numpy()
    assert len(set(labels)) == 3
    assert all(len({labels[index] for index in range(family, 24, 3)}) == 1 for family in range(3))
    unrelated = AdapterCollection.from_factors(members(24, common=0.0)).measure()
    assert set(unrelated.members["cluster"]) == {0}
    assert len(set(AdapterCollection.from_factors(members(24)).measure(clusters=5).members["cluster"])) >= 4


def test_the_cut_lies_in_the_widest_gap_below_chance() -> None:
    overlap = np.full((6, 6), 0.1)
    for start in (0, 3):
        overlap[start : start + 3, start : start + 3] = 0.8
    np.fill_diagonal(overlap, 1.0)
    tree = cluster_tree(overlap, 0.05)
    assert tree.clusters.tolist() == [1, 1, 1, 2, 2, 2]
    assert tree.cut == pytest.approx((0.2**0.5 + 0.9**0.5) / 2)
    assert cluster_tree(overlap, 0.85).clusters.tolist() == [0] * 6
    alone = cluster_tree(overlap, 0.05, clusters=6)
    assert (alone.clusters.tolist(), alone.cut) == ([0] * 6, 0.0)  # the page drew a line at the top of the tree


def test_equal_members_are_not_cut_apart_and_that_is_said() -> None:
    overlap = np.full((4, 4), 0.1)
    overlap[:3, :3] = 1.0
    np.fill_diagonal(overlap, 1.0)
    with pytest.warns(UserWarning, match="2 clusters instead of 3"):
        assert cluster_tree(overlap, 0.05, clusters=3).clusters.tolist() == [1, 1, 1, 0]


def test_a_member_without_any_change_is_measured() -> None:
    factors = members(4)
    factors["zero"] = {layer: (0 * left, right) for layer, (left, right) in factors["member-0"].items()}
    rows = AdapterCollection.from_factors(factors).measure().members.set_index("member")
    assert rows.loc["zero", ["frobenius", "zero_layers", "cluster"]].tolist() == [0, len(LAYERS), 0]
    assert np.isnan(rows.loc["zero", "top1_energy"])


def test_the_first_outlier_has_the_p_of_students_law() -> None:
    sample = stats.norm.ppf(np.linspace(0.04, 0.96, 24))
    values = np.append(sample, 4.0)
    others, count = sample, len(values)
    t = (4.0 - others.mean()) / (others.std(ddof=1) * (1 + 1 / len(others)) ** 0.5)
    expected = 2 * count * 2 * stats.t.sf(t, count - 2)
    assert outlier_p_values(values)[-1] == pytest.approx(expected)
    # two outliers side by side: each alone hides behind the spread that the other makes
    hidden = outlier_p_values([*sample, 60.0, 61.0])
    assert (hidden[-2:] < 1e-6).all()
    assert (hidden[:-2] == 1).all()
    assert outlier_p_values([1.0] * 10).tolist() == [1.0] * 10
    assert outlier_p_values([1.0, 2.0, 90.0]).tolist() == [1.0] * 3
    assert np.isnan(outlier_p_values([np.nan, *sample])[0])


def test_normal_samples_have_an_outlier_in_at_most_five_percent() -> None:
    draw = np.random.default_rng(0)
    alarms = sum(outlier_p_values(draw.normal(size=40)).min() < 0.05 for _ in range(400))
    assert alarms <= 400 * 0.05  # 8 are expected: the first step has half of the level


def test_the_diverged_member_is_the_outlier() -> None:
    factors = members(24, common=0.0)
    factors["member-7"] = {layer: (30 * left, right) for layer, (left, right) in factors["member-7"].items()}
    tables = AdapterCollection.from_factors(factors).measure()
    found = tables.found_outliers
    np.testing.assert_allclose(tables.outliers["p_adjusted"], np.minimum(1.0, 4 * tables.outliers["p"]))  # 4 columns
    assert found["member"].tolist() == ["member-7"]
    assert found["metric"].tolist() == ["frobenius"]


def test_the_page_and_the_figures_show_the_findings(tmp_path: Path) -> None:
    factors = members(70)
    factors["<b>bold</b> $x_1$"] = factors.pop("member-0")
    tables = AdapterCollection.from_factors(factors).measure(curves=2)
    page = write_many_report(tmp_path / "page.html", tables).read_text(encoding="utf-8")
    assert "3 clusters of related adapters" in page
    assert "<b>bold</b>" not in page
    assert page.count("<img ") == 2
    ticks = [text.get_text() for text in plot_dendrogram(tables).axes[0].get_yticklabels()]
    assert ticks == [f"cluster {number} ({size})" for number, size in _sizes(tables, ticks)]
    drawn = plot_common_directions(tables.curves)
    assert drawn.get_xscale() == "log"
    with pytest.raises(ValueError, match="no curve"):
        plot_common_directions(tables.curves[:0])


def _sizes(tables: CollectionTables, ticks: list[str]) -> list[tuple[int, int]]:
    counts = tables.members["cluster"].value_counts()
    order = sorted(int(text.split()[1]) for text in ticks)
    return [(number, int(counts[number])) for number in order]
