"""Every interference metric beside a dense float64 twin, and by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis import AdapterSet, Checkpoint, component_table, interference_table, principal_angles
from analysis.tables import relation_to_base
from analysis.tables.base_relation import intruder_dimensions

EYE = torch.eye(8)
RANKS = {"a": 2, "b": 3, "c": 3}
SIZES = {"h.0.q": (9, 7), "h.1.q": (9, 7), "h.0.mlp": (6, 10)}
SLACK = 1e-10  # float64 throughout: a hundred roundings of numbers of order one


def drawn(seed: int = 0) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        task: {
            layer: (torch.randn(m, r, generator=draw), torch.randn(n, r, generator=draw))
            for layer, (m, n) in SIZES.items()
        }
        for task, r in RANKS.items()
    }


UPDATES = drawn()
ADAPTERS = AdapterSet.from_factors(UPDATES)


def dense(task: str, layer: str) -> NDArray[np.float64]:
    left, right = UPDATES[task][layer]
    return (left.double() @ right.double().T).numpy()


def svd(task: str, layer: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    u, s, vt = np.linalg.svd(dense(task, layer), full_matrices=False)
    r = RANKS[task]
    return u[:, :r], s[:r], vt[:r].T


def value(table: pd.DataFrame, metric: str, layer: str, a: str, b: str, column: str = "value") -> float:
    keys = {"metric": metric, "layer": layer, "task_a": a, "task_b": b}
    return float(table[(table[list(keys)] == pd.Series(keys)).all(axis=1)][column].item())


@pytest.mark.parametrize("pair", [("a", "b"), ("a", "c"), ("b", "c")], ids="".join)
def test_backward_and_forward_metrics_are_those_of_the_dense_updates(pair: tuple[str, str]) -> None:
    a, b = pair
    table = interference_table(ADAPTERS)
    tops, bottoms, insides, weights = 0.0, 0.0, 0.0, 0.0
    ratios: list[float] = []
    for layer in SIZES:
        later = dense(b, layer)
        u, s, v = svd(a, layer)
        top, bottom = np.linalg.norm(later @ v) ** 2, np.linalg.norm(later) ** 2
        assert value(table, "backward", layer, a, b) == pytest.approx(top / bottom, rel=SLACK)
        assert value(table, "backward", layer, a, b, "chance") == pytest.approx(RANKS[a] / later.shape[1])
        inside = u.T @ later @ v
        subspace = np.linalg.norm(inside) / np.linalg.norm(s)
        assert value(table, "forward_subspace", layer, a, b) == pytest.approx(subspace, rel=SLACK)
        corruption = np.abs(np.diag(inside)) / s
        assert value(table, "forward_corruption", layer, a, b) == pytest.approx(corruption.mean(), rel=SLACK)
        assert value(table, "forward_corruption_max", layer, a, b) == pytest.approx(corruption.max(), rel=SLACK)
        energetic = (s**2 * corruption).sum() / (s**2).sum()
        assert value(table, "forward_corruption_energy", layer, a, b) == pytest.approx(energetic, rel=SLACK)
        tops, bottoms = tops + top, bottoms + bottom
        insides, weights = insides + np.linalg.norm(inside) ** 2, weights + (s**2).sum()
        ratios += corruption.tolist()
    assert value(table, "backward", "total", a, b) == pytest.approx(tops / bottoms, rel=SLACK)
    assert value(table, "forward_subspace", "total", a, b) == pytest.approx(np.sqrt(insides / weights), rel=SLACK)
    assert value(table, "forward_corruption", "total", a, b) == pytest.approx(np.mean(ratios), rel=SLACK)
    assert value(table, "forward_corruption_max", "total", a, b) == pytest.approx(max(ratios), rel=SLACK)


def test_a_weak_component_is_wiped_out_by_hand() -> None:
    """a has σ = 4 and 0.1; b adds 0.2 to each of its components: 5 % of the strong one, twice the weak one."""
    strong, weak = torch.tensor([4.0, 0.1]), torch.tensor([0.2, 0.2])
    frames = EYE[:, :2]
    adapters = AdapterSet.from_factors({"a": {"x": (frames * strong, frames)}, "b": {"x": (frames * weak, frames)}})
    table = interference_table(adapters)
    assert value(table, "forward_corruption", "x", "a", "b") == pytest.approx((0.05 + 2.0) / 2, rel=1e-6)  # float32 0.1
    assert value(table, "forward_corruption_max", "x", "a", "b") == pytest.approx(2.0, rel=1e-6)
    found = component_table(adapters)
    first = found[found["task"] == "a"]
    np.testing.assert_allclose(first["forward_corruption"], [0.05, 2.0], rtol=1e-6)
    np.testing.assert_allclose(first["energy_share"], [16 / 16.01, 0.01 / 16.01], rtol=1e-6)
    assert found[found["task"] == "b"]["forward_corruption"].isna().all()  # nothing comes after it
    assert found["backward_share"].isna().all()  # nothing is protected


def test_components_share_what_leaks_and_are_corrupted_by_all_later_updates() -> None:
    basis = {layer: torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q for layer, (_, n) in SIZES.items()}
    table = component_table(ADAPTERS, protected=basis)
    for layer in SIZES:
        u, s, v = svd("a", layer)
        later = dense("b", layer) + dense("c", layer)
        rows = table[(table["task"] == "a") & (table["layer"] == layer)]
        energy = s**2 * np.linalg.norm(basis[layer].numpy().T @ v, axis=0) ** 2
        np.testing.assert_allclose(rows["sigma"], s, rtol=SLACK)
        np.testing.assert_allclose(rows["backward_share"], energy / energy.sum(), rtol=SLACK)
        np.testing.assert_allclose(rows["forward_corruption"], np.abs(np.diag(u.T @ later @ v)) / s, rtol=1e-8)
    leaks = interference_table(ADAPTERS, protected=basis)
    exact = np.linalg.norm(dense("a", "h.0.q") @ basis["h.0.q"].numpy()) ** 2 / np.linalg.norm(dense("a", "h.0.q")) ** 2
    assert value(leaks, "leakage", "h.0.q", "protected", "a") == pytest.approx(exact, rel=SLACK)
    with pytest.raises(ValueError, match=r"h\.0\.q: the protected basis has shape \(4, 1\), \(7, k\) was expected"):
        interference_table(ADAPTERS, protected={"h.0.q": torch.ones(4, 1)})


def test_subspaces_of_another_model_are_not_passed_over() -> None:
    for table in (interference_table, component_table):
        with pytest.raises(ValueError, match=r"none of the 1 protected layers is adapted: they are called like other"):
            table(ADAPTERS, protected={"other": torch.eye(3)})


def test_principal_angles_are_those_of_scipy_and_small_ones_keep_their_digits() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    table = principal_angles(ADAPTERS)
    for side in ("input", "output"):
        for layer in SIZES:
            place = 2 if side == "input" else 0
            expected = np.sort(linalg.subspace_angles(svd("a", layer)[place], svd("b", layer)[place]))
            rows = table[(table["layer"] == layer) & (table["side"] == side) & (table["task_a"] == "a")]
            found = rows[rows["task_b"] == "b"]
            np.testing.assert_allclose(found["angle"], expected, atol=1e-9)  # acos is off by √eps near 0 at worst
            np.testing.assert_allclose(found["cosine"], np.cos(expected), atol=1e-9)
            assert set(found["width"]) == {SIZES[layer][1 if side == "input" else 0]}
            assert found["index"].tolist() == [1, 2]
    tiny = 2.0**-12  # exact in float32 beside 1
    adapters = AdapterSet.from_factors(
        {"a": {"x": (EYE[:, :1], EYE[:, :1])}, "b": {"x": (EYE[:, :1], EYE[:, :1] + tiny * EYE[:, 1:2])}}
    )
    found = principal_angles(adapters)
    assert found[found["side"] == "input"]["angle"].item() == pytest.approx(np.arctan(tiny), rel=1e-12)


def test_a_rank_deficient_update_has_only_the_angles_it_uses() -> None:
    both = torch.stack([EYE[:, 0], EYE[:, 1]], 1)
    unused = both * torch.tensor([1.0, 0.0])
    adapters = AdapterSet.from_factors({"a": {"x": (unused, both)}, "b": {"x": (both, both)}})
    table = principal_angles(adapters)
    assert table["angle"].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)  # one a side
    assert table["rank_a"].tolist() == [1, 1]


@pytest.mark.parametrize("root", [False, True])
def test_activation_weighted_metrics_are_traces_with_the_covariance(root: bool) -> None:
    draw = torch.Generator().manual_seed(5)
    roots = {layer: torch.randn(n, n + 2, generator=draw).double() for layer, (_, n) in SIZES.items()}
    given = {"a": {layer: factor if root else factor @ factor.T for layer, factor in roots.items()}}
    base = {layer: torch.randn(m, n, generator=draw) for layer, (m, n) in SIZES.items()}
    checkpoint = Held({f"{layer}.weight": weight for layer, weight in base.items()})
    table = interference_table(ADAPTERS, covariances=given, base=checkpoint)
    for layer, (_, n) in SIZES.items():
        c = (roots[layer] @ roots[layer].T).numpy()
        w, x, y = base[layer].double().numpy(), dense("a", layer), dense("b", layer)
        drift = np.trace(y @ c @ y.T)
        expected = drift / (np.linalg.norm(y) ** 2 * np.trace(c) / n)
        assert value(table, "activation_drift", layer, "a", "b") == pytest.approx(expected, rel=SLACK)
        cosine = np.trace(x @ c @ y.T) / np.sqrt(np.trace(x @ c @ x.T) * drift)
        assert value(table, "activation_alignment", layer, "a", "b") == pytest.approx(cosine, abs=SLACK)
        relative = drift / np.trace(w @ c @ w.T)
        assert value(table, "activation_drift_relative", layer, "a", "b") == pytest.approx(relative, rel=SLACK)
    assert set(table[table["metric"] == "activation_drift"]["task_a"]) == {"a"}  # only its inputs are known
    with pytest.raises(ValueError, match=r"a, h\.0\.q: the covariance has shape \(3, 3\), \(7, 7\) or a root"):
        interference_table(ADAPTERS, covariances={"a": {"h.0.q": torch.eye(3)}})
    with pytest.raises(ValueError, match=r"a, h\.0\.q: the covariance is not symmetric"):
        interference_table(ADAPTERS, covariances={"a": {"h.0.q": torch.ones(7, 7).triu()}})


class Held(Checkpoint):
    """A checkpoint in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(None, None, {name: tuple(t.shape) for name, t in tensors.items()}, {})  # type: ignore[arg-type]
        object.__setattr__(self, "tensors", tensors)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]  # type: ignore[attr-defined,no-any-return]


def test_white_inputs_drift_as_expected_by_hand() -> None:
    table = interference_table(ADAPTERS, covariances={"a": {"h.0.q": 3.0 * torch.eye(7)}})
    assert value(table, "activation_drift", "h.0.q", "a", "c") == pytest.approx(1.0, rel=SLACK)
    assert value(table, "activation_alignment", "h.0.q", "a", "c") == pytest.approx(
        value(table, "alignment", "h.0.q", "a", "c"), abs=SLACK
    )


def test_the_budget_of_memory_does_not_change_interference() -> None:
    pd.testing.assert_frame_equal(
        interference_table(ADAPTERS, memory_budget=1), interference_table(ADAPTERS), rtol=1e-12
    )
    # batched products may round in another order
    pd.testing.assert_frame_equal(component_table(ADAPTERS, memory_budget=1), component_table(ADAPTERS), rtol=1e-9)


def test_the_relation_to_the_base_is_that_of_dense_matrices() -> None:
    draw = torch.Generator().manual_seed(6)
    base = {f"{layer}.weight": torch.randn(m, n, generator=draw) for layer, (m, n) in SIZES.items()}
    table = relation_to_base(ADAPTERS, Held(base), top=2, threshold=0.6)

    def found(task: str, update: str, metric: str) -> float:
        rows = table[(table["layer"] == "h.0.mlp") & (table["task"] == task) & (table["update"] == update)]
        return float(rows[rows["metric"] == metric]["value"].item())

    weight = base["h.0.mlp.weight"].numpy()
    change = dense("a", "h.0.mlp") + dense("b", "h.0.mlp")
    slack = 1e-5  # float32 throughout
    exact = np.linalg.norm(change) / np.linalg.norm(weight)
    assert found("b", "accumulated", "norm_ratio") == pytest.approx(exact, rel=slack)
    exact = np.linalg.norm(change, 2) / np.linalg.norm(weight, 2)
    assert found("b", "accumulated", "spectral_norm_ratio") == pytest.approx(exact, rel=slack)
    cosines = np.abs(np.linalg.svd(weight)[0][:, :6].T @ np.linalg.svd(weight + change)[0][:, :2])
    assert found("b", "accumulated", "intruder_dimensions") == (cosines.max(0) < 0.6).sum()
    with pytest.raises(ValueError, match=r"the base weight of h\.0\.mlp is zero"):
        relation_to_base(ADAPTERS, Held({name: 0 * w for name, w in base.items()}))


def test_an_update_along_the_base_brings_no_intruder() -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert intruder_dimensions(weight, 0.1 * weight) == 0
