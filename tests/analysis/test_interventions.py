"""Changed adapters differ in what they should and in nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from analysis import (
    AdapterSet,
    flattened,
    interference_table,
    levelled,
    redirected,
    rotated_away,
    rotated_into,
    scaled,
    sharpened,
    truncated,
)
from analysis.tables.functional_drift import functional_drift

SLACK = 2e-6  # factors are kept in float32


def one(left: Tensor, right: Tensor) -> AdapterSet:
    return AdapterSet.from_factors({"a": {"x": (left, right)}})


def dense(adapters: AdapterSet) -> Tensor:
    left, right = adapters.factors("a", "x")
    return left.double() @ right.double().T


def sigma(adapters: AdapterSet, r: int) -> Tensor:
    return torch.linalg.svdvals(dense(adapters))[:r]


def leak(adapters: AdapterSet, basis: Tensor) -> float:
    return float((dense(adapters) @ basis.double()).square().sum() / dense(adapters).square().sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.floats(0, 1), st.integers(0, 10**6))
def test_the_norm_and_the_directions_stay(r: int, gamma: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    start = one(torch.randn(9, r, generator=draw), torch.randn(8, r, generator=draw))
    before, norm = sigma(start, r), dense(start).norm()
    for changed, power in ((flattened(start, gamma), 1 - gamma), (sharpened(start, gamma), 1 + gamma)):
        expected = before**power
        expected = expected * norm / expected.norm()
        torch.testing.assert_close(sigma(changed, r), expected, rtol=0, atol=SLACK * float(norm))
        # the same singular subspaces: columns and rows stay within those of the start
        u, _, vt = torch.linalg.svd(dense(start), full_matrices=False)
        inside = u[:, :r] @ u[:, :r].T @ dense(changed) @ vt[:r].T @ vt[:r]
        torch.testing.assert_close(inside, dense(changed), rtol=0, atol=10 * SLACK * float(norm))


def test_gamma_zero_is_nothing_and_one_is_flat() -> None:
    start = one(torch.randn(9, 3), torch.randn(8, 3))
    torch.testing.assert_close(dense(flattened(start, 0.0)), dense(start), rtol=0, atol=1e-5)
    flat = sigma(flattened(start, 1.0), 3)
    torch.testing.assert_close(flat, torch.full((3,), float(dense(start).norm()) / 3**0.5).double(), rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_rotations_keep_spectra_and_outputs_and_move_inputs(r: int, k: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    start = one(torch.randn(9, r, generator=draw), torch.randn(12, r, generator=draw))
    basis = torch.linalg.qr(torch.randn(12, k, generator=draw)).Q
    norm, columns = float(dense(start).norm()), torch.linalg.qr(start.factors("a", "x")[0].double()).Q
    leaks = []
    for turned in (
        rotated_away(start, {"x": basis}),
        rotated_away(start, {"x": basis}, 0.5),
        start,
        rotated_into(start, {"x": basis}, 0.5),
        rotated_into(start, {"x": basis}),
    ):
        torch.testing.assert_close(sigma(turned, r), sigma(start, r), rtol=0, atol=10 * SLACK * norm)
        change = dense(turned)
        torch.testing.assert_close(columns @ (columns.T @ change), change, rtol=0, atol=10 * SLACK * norm)
        leaks.append(leak(turned, basis))
    assert leaks[0] < 1e-12  # float32 rounding, squared
    assert leaks == sorted(leaks)
    if k >= r:
        assert leaks[-1] == pytest.approx(1.0, abs=1e-5)


def test_half_a_rotation_by_hand() -> None:
    """An input at 30 degrees to F: halfway out of it is 60 degrees, halfway into it 15."""
    angle = np.pi / 6
    basis = torch.eye(4)[:, :1]
    v = np.cos(angle) * torch.eye(4)[:, :1] + np.sin(angle) * torch.eye(4)[:, 1:2]
    start = one(torch.eye(4)[:, :1], v)
    assert leak(rotated_away(start, {"x": basis}, 0.5), basis) == pytest.approx(np.cos(np.pi / 3) ** 2, abs=SLACK)
    assert leak(rotated_into(start, {"x": basis}, 0.5), basis) == pytest.approx(np.cos(np.pi / 12) ** 2, abs=SLACK)


def test_an_input_within_the_subspace_finds_a_free_direction_or_is_refused() -> None:
    eye = torch.eye(5)
    start = one(eye[:, :2], eye[:, :2])
    away = rotated_away(start, {"x": eye[:, :3]})
    assert leak(away, eye[:, :3]) < 1e-12
    torch.testing.assert_close(sigma(away, 2), torch.ones(2).double(), rtol=0, atol=SLACK)
    with pytest.raises(ValueError, match="4 protected directions leave 1 of 5, too few for rank 2: protect less"):
        rotated_away(start, {"x": eye[:, :4]})


def test_bad_input_is_refused_by_name() -> None:
    start = one(torch.randn(4, 2), torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"gamma is 1\.5, a number from 0 to 1"):
        flattened(start, 1.5)
    with pytest.raises(ValueError, match="a, x: the update is zero, there is nothing to change"):
        sharpened(one(torch.zeros(4, 2), torch.ones(5, 2)), 0.5)
    with pytest.raises(ValueError, match="y is protected, but no layer of the adapters; the first is x"):
        rotated_into(start, {"y": torch.eye(5)})
    with pytest.raises(ValueError, match=r"x: the protected basis has shape \(4, 4\), \(5, k\) was expected"):
        rotated_into(start, {"x": torch.eye(4)})
    with pytest.raises(ValueError, match=r"x: the protected basis is not orthonormal, off by 3\.0e\+00"):
        rotated_away(start, {"x": 2 * torch.eye(5)[:, :1]})
    with pytest.raises(ValueError, match=r"x: the protected basis is not orthonormal, off by nan"):
        rotated_away(start, {"x": torch.full((5, 1), torch.nan)})


def test_a_flattened_adapter_runs_in_a_model_that_stock_peft_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(6, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.x(inputs)

    torch.manual_seed(0)
    start = one(torch.randn(5, 3), torch.randn(6, 3))
    changed = flattened(start, 1.0)
    model, inputs = Model(), torch.randn(20, 6)
    plain = model(inputs)
    loaded = peft.PeftModel.from_pretrained(model, str(changed.save(tmp_path / "flat") / "01-a"))
    torch.testing.assert_close(loaded(inputs), plain + inputs @ dense(changed).float().T, rtol=1e-5, atol=1e-5)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(6, 5)
        self.y = nn.Linear(5, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.y(torch.tanh(self.x(inputs)))


def test_functional_drift_is_the_divergence_of_two_models_and_leaves_no_trace() -> None:
    torch.manual_seed(1)
    model = Classifier().train()
    adapters = AdapterSet.from_factors(
        {
            task: {"x": (0.3 * torch.randn(5, 2), torch.randn(6, 2)), "y": (0.3 * torch.randn(4, 2), torch.randn(5, 2))}
            for task in "ab"
        }
    )
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    data = {"old": [torch.randn(7, 6), torch.randn(3, 6)], "new": [(torch.randn(4, 6),)]}
    for update, tasks in (("task", ("b",)), ("accumulated", ("a", "b"))):
        table = functional_drift(model, adapters, data, update=update)
        twin = Classifier()
        twin.load_state_dict(kept)
        inputs = torch.cat(data["old"])
        before = twin(inputs).detach().double()
        for task in tasks:
            for _, layer, left, right in adapters.read(task, adapters.layers):
                twin.get_submodule(layer).weight.data += left @ right.T
        after = twin(inputs).detach().double()
        kl = nn.functional.kl_div(after.log_softmax(-1), before.softmax(-1), reduction="batchmean").item()
        rows = table[(table["task"] == "b") & (table["data"] == "old")].set_index("metric")["value"]
        assert rows["kl"] == pytest.approx(kl, rel=1e-4)  # float32 models
        assert rows["logit_rms"] == pytest.approx((after - before).square().mean().sqrt().item(), rel=1e-4)
        assert rows["top1_change"] == (after.argmax(-1) != before.argmax(-1)).double().mean().item()
        assert len(table) == 2 * 2 * 3
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert model.training


class Answering(Classifier):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"scores": self.x(inputs)}


def test_drift_puts_weights_back_after_an_error_and_names_what_does_not_fit() -> None:
    model = Classifier()
    kept = model.x.weight.detach().clone()
    adapters = one(torch.randn(5, 2), torch.randn(6, 2))
    calls = []

    def fail(module: nn.Module, batch: Tensor) -> Tensor:
        calls.append(batch)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return module(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        functional_drift(model, adapters, {"d": [torch.randn(2, 6)]}, forward=fail)
    assert torch.equal(model.x.weight, kept)
    with pytest.raises(ValueError, match="at least one batch under every name"):
        functional_drift(model, adapters, {"d": []})
    with pytest.raises(ValueError, match="update is 'both', choose 'task' or 'accumulated'"):
        functional_drift(model, adapters, {"d": [torch.randn(2, 6)]}, update="both")
    with pytest.raises(ValueError, match="1 of 1 layers are no modules of the model, the first is z"):
        functional_drift(model, AdapterSet.from_factors({"a": {"z": (torch.ones(2, 1),) * 2}}), {"d": [torch.ones(1)]})
    odd = one(torch.randn(3, 2), torch.randn(6, 2))
    with pytest.raises(ValueError, match=r"x: the update is \(3, 6\), the module's weight is \(5, 6\)"):
        functional_drift(model, odd, {"d": [torch.randn(2, 6)]})
    with pytest.raises(TypeError, match="the model returned a dict: give forward="):
        functional_drift(Answering(), adapters, {"d": [torch.ones(1, 6)]})


def test_inputs_may_be_given_by_keyword() -> None:
    from analysis import input_covariances

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(6, 5)

        def forward(self, batch: Tensor) -> Tensor:
            return self.x(input=batch)

    batch = torch.randn(7, 6)
    found = input_covariances(Named(), ["x"], [batch])["x"]
    torch.testing.assert_close(found, batch.double().T @ batch.double() / 7, rtol=1e-12, atol=1e-12)


def test_covariances_are_second_moments_of_what_modules_see() -> None:
    from analysis import input_covariances

    model, batches = Classifier(), [torch.randn(3, 2, 6), torch.randn(1, 2, 6)]
    found = input_covariances(model, ["x", "y"], batches)
    inputs = torch.cat([batch.reshape(-1, 6) for batch in batches]).double()
    torch.testing.assert_close(found["x"], inputs.T @ inputs / 8, rtol=1e-12, atol=1e-12)
    hidden = torch.tanh(model.x(inputs.float())).double()
    torch.testing.assert_close(found["y"], hidden.T @ hidden / 8, rtol=1e-6, atol=1e-6)
    assert not model.x._forward_pre_hooks
    with pytest.raises(ValueError, match="no batch reached x"):
        input_covariances(model, ["x"], [])
    adapters = one(torch.randn(5, 2), torch.randn(6, 2))
    two = AdapterSet.from_factors({"a": {"x": adapters.factors("a", "x")}, "b": {"x": adapters.factors("a", "x")}})
    table = interference_table(two, covariances={"a": {"x": found["x"]}})
    change = dense(adapters)
    drift = float(torch.trace(change @ found["x"] @ change.T))
    white = float(change.square().sum() * found["x"].trace() / 6)
    rows = table[(table["metric"] == "activation_drift") & (table["layer"] == "x")]
    assert rows["value"].item() == pytest.approx(drift / white, rel=1e-9)


@pytest.mark.parametrize(("norm", "order"), [("frobenius", 2), ("spectral", float("inf")), ("nuclear", 1)])
def test_the_chosen_norm_stays_and_the_others_do_not(norm: Any, order: float) -> None:
    draw = torch.Generator().manual_seed(3)
    start = one(torch.randn(9, 4, generator=draw), torch.randn(8, 4, generator=draw))
    changes = (
        flattened(start, 1.0, norm=norm),
        flattened(start, 0.5, norm=norm),
        sharpened(start, 1.0, norm=norm),
        truncated(start, 1, norm=norm),
    )
    for changed in changes:
        size = torch.linalg.vector_norm(sigma(changed, 4), order)
        torch.testing.assert_close(size, torch.linalg.vector_norm(sigma(start, 4), order), rtol=1e-5, atol=0)
    for other in {1, 2, float("inf")} - {order}:
        flat = torch.linalg.vector_norm(sigma(changes[0], 4), other)
        assert abs(float(flat / torch.linalg.vector_norm(sigma(start, 4), other)) - 1) > 0.05
    with pytest.raises(ValueError, match="norm is 'trace', choose from frobenius, spectral, nuclear"):
        flattened(start, 1.0, norm="trace")  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_random_directions_keep_singular_values_and_the_other_side(side: Any) -> None:
    draw = torch.Generator().manual_seed(5)
    start = one(torch.randn(40, 3, generator=draw), torch.randn(50, 3, generator=draw))
    changed = redirected(start, side=side)
    torch.testing.assert_close(sigma(changed, 3), sigma(start, 3), rtol=1e-5, atol=0)
    (u, _, vt), (new_u, _, new_vt) = (torch.linalg.svd(dense(each), full_matrices=False) for each in (start, changed))
    for moved, before, after in (
        (side != "input", u[:, :3], new_u[:, :3]),
        (side != "output", vt[:3].T, new_vt[:3].T),
    ):
        shared = float((before.T @ after).square().sum() / 3)  # 1 for equal spaces, about 3 / 40 for random ones
        assert shared == pytest.approx(1.0, abs=1e-5) if not moved else shared < 0.4
    assert torch.equal(dense(redirected(start, side=side)), dense(changed))
    assert not torch.allclose(dense(redirected(start, side=side, seed=1)), dense(changed), atol=0.1)


def test_layers_get_different_random_directions_and_bad_input_is_named() -> None:
    left, right = torch.randn(9, 2), torch.randn(8, 2)
    start = AdapterSet.from_factors({"a": {"x": (left, right), "y": (left, right)}})
    changed = redirected(start)
    assert not torch.allclose(changed.factors("a", "x")[1], changed.factors("a", "y")[1], atol=0.1)
    torch.testing.assert_close(dense(scaled(one(left, right), 3.0)), 3 * dense(one(left, right)))
    with pytest.raises(ValueError, match="side is 'left', choose 'input', 'output' or 'both'"):
        redirected(start, side="left")  # type: ignore[arg-type]
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a positive number was expected"):
            scaled(start, factor)


def test_levelled_layers_have_one_norm_and_the_total_stays() -> None:
    draw = torch.Generator().manual_seed(8)
    layers = {
        name: (size * torch.randn(9, 2, generator=draw), torch.randn(8, 2, generator=draw))
        for name, size in (("x", 1.0), ("y", 5.0), ("z", 0.1))
    }
    start = AdapterSet.from_factors({"a": layers})

    def norms(adapters: AdapterSet) -> Tensor:
        return torch.stack([torch.linalg.matrix_norm(left @ right.T) for _, _, left, right in adapters])

    before, half, full = norms(start), norms(levelled(start, 0.5)), norms(levelled(start))
    for after in (half, full):
        torch.testing.assert_close(after.norm(), before.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(full, full.mean().expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(half[0] / half[1], (before[0] / before[1]).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(norms(levelled(start, 0.0)), before, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="gamma is 2"):
        levelled(start, 2)
    zero = AdapterSet.from_factors({"a": {**layers, "y": (torch.zeros(9, 2), torch.ones(8, 2))}})
    with pytest.raises(ValueError, match="a, y: the update is zero"):
        levelled(zero)
