"""The layers themselves: what they compute, what their update is, what they refuse."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_cl import (
    EBLoRALinear,
    ProtectedSubspace,
    RiemannianAdamW,
    adapters_of,
    inject_adapters,
    merge_adapters,
    param_groups,
    save_adapters,
)
from manifold_cl.adapters import Adapter, Factors, LoRALinear

EPS = 2.0**-23
M, N, R = 12, 20, 4


def base(generator: torch.Generator, m: int = M, n: int = N) -> nn.Linear:
    linear = nn.Linear(n, m)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(m, n, generator=generator) / n**0.5)
        linear.bias.copy_(torch.randn(m, generator=generator))
    return linear


def directions(generator: torch.Generator, n: int = N, k: int = 6) -> ProtectedSubspace:
    return ProtectedSubspace.from_directions(torch.randn(n, k, generator=generator))


def adapter_of(kind: str, linear: nn.Linear, generator: torch.Generator) -> Adapter:
    """An adapter in the middle of its training: no factor is zero."""
    if kind == "eblora":
        return EBLoRALinear(
            linear, R, complement=directions(generator), initial_scale=-0.5, alpha=6.0, generator=generator
        )
    adapter = LoRALinear(linear, R, alpha=6.0, generator=generator)
    with torch.no_grad():
        adapter.left.copy_(torch.randn(M, R, generator=generator))
    return adapter


def update(adapter: Adapter) -> Tensor:
    """The formula of the class's docstring in float64, written out."""
    s = float(adapter.scale.detach()) if isinstance(adapter, EBLoRALinear) else 1.0
    return adapter.alpha / adapter.rank * s * adapter.left.detach().double() @ adapter.right.detach().double().T


@pytest.mark.parametrize("kind", ["eblora", "lora"])
def test_the_update_from_factors_is_the_dense_formula(kind: str, generator: torch.Generator) -> None:
    adapter = adapter_of(kind, base(generator), generator)
    dense = update(adapter)
    assert dense.norm() > 0.1
    found = adapter.factors().delta_weight()
    assert found.dtype == torch.float32
    assert (found - dense).abs().max() <= (R + 2) * EPS * dense.abs().max() * R  # a sum of R float32 products each


@pytest.mark.parametrize("kind", ["eblora", "lora"])
def test_the_forward_pass_is_that_of_the_merged_weight(kind: str, generator: torch.Generator) -> None:
    linear = base(generator)
    adapter = adapter_of(kind, linear, generator)
    x = torch.randn(5, 7, N, generator=generator)
    expected = x.double() @ (linear.weight.detach().double() + update(adapter)).T + linear.bias.detach().double()
    found = adapter(x)
    assert found.shape == (5, 7, M)
    assert (found - expected).norm() <= 1e-6 * expected.norm()  # float32: about 8 roundings of a unit result
    assert (linear(x) - expected).norm() > 0.05 * expected.norm()  # the update is no small part of it


@pytest.mark.parametrize("kind", ["eblora", "lora"])
def test_float64_inputs_on_a_float64_base_are_computed_in_float64(kind: str, generator: torch.Generator) -> None:
    linear = base(generator).double()
    adapter = adapter_of(kind, linear, generator)
    assert adapter.left.dtype == torch.float32
    x = torch.randn(9, N, dtype=torch.float64, generator=generator)
    expected = x @ (linear.weight.detach() + update(adapter)).T + linear.bias.detach()
    assert (adapter(x) - expected).norm() <= 1e-14 * expected.norm()  # the float32 magnitude, 0.75 or 1.5, is exact
    weight = linear.weight.detach().clone()
    model = nn.Sequential(adapter)
    merge_adapters(model)
    assert model[0].weight.dtype == torch.float64
    added = model[0].weight - weight
    assert (added - adapter.factors().delta_weight()).abs().max() < 1e-15  # W keeps the digits float32 lacks


@pytest.mark.parametrize("kind", ["eblora", "lora"])
def test_a_bfloat16_base_keeps_float32_factors_and_answers_in_bfloat16(kind: str, generator: torch.Generator) -> None:
    linear = base(generator).to(torch.bfloat16)
    adapter = adapter_of(kind, linear, generator)
    assert {p.dtype for name, p in adapter.named_parameters() if not name.startswith("base.")} == {torch.float32}
    x = torch.randn(50, N, generator=generator).to(torch.bfloat16)
    expected = x.double() @ (linear.weight.detach().double() + update(adapter)).T + linear.bias.detach().double()
    found = adapter(x)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 2 * 2.0**-8 * expected.norm()  # bfloat16 rounds to 2⁻⁸, four times
    model = nn.Sequential(adapter)
    sums = linear.weight.detach().double() + update(adapter)
    merge_adapters(model)
    assert model[0].weight.dtype == torch.bfloat16
    rounding = (model[0].weight.double() - sums).abs() / sums.abs()
    assert float(rounding.max()) <= 2.0**-8  # rounded once: bfloat16 has 8 significant bits, half an ulp is 2⁻⁹..2⁻⁸


def test_all_singular_values_of_the_balanced_update_are_the_magnitude(generator: torch.Generator) -> None:
    adapter = EBLoRALinear(
        base(generator), R, complement=directions(generator), initial_scale=-0.3, alpha=10.0, generator=generator
    )
    sigma = torch.linalg.svdvals(adapter.factors().delta_weight().double())
    torch.testing.assert_close(sigma[:R], torch.full((R,), 0.75, dtype=torch.float64), rtol=1e-6, atol=0)  # float32
    assert float(sigma[R:].max()) < 1e-7  # rank R, to float32 rounding
    assert float(adapter.magnitude().detach()) == pytest.approx(-0.75, rel=EPS)


def test_a_new_balanced_adapter_is_off_the_protected_subspace(generator: torch.Generator) -> None:
    protected = directions(generator, k=14)
    adapter = EBLoRALinear(base(generator), R, complement=protected, initial_scale=-1.0, generator=generator)
    assert adapter.right_manifold.constraint_error(adapter.right).protection < 1e-7  # one rounding to float32
    assert adapter.right_manifold.constraint_error(adapter.right).orthonormality < 5e-7
    protected_inputs = torch.randn(8, 14, generator=generator) @ protected.basis.T
    difference = (adapter(protected_inputs) - adapter.base(protected_inputs)).detach()
    assert float(difference.abs().max()) < 2e-6  # rounding of outputs near 4: what is protected is not touched
    free_inputs = torch.randn(8, N, generator=generator)
    assert float((adapter(free_inputs) - adapter.base(free_inputs)).detach().abs().max()) > 0.1


def test_a_new_plain_adapter_changes_exactly_nothing(generator: torch.Generator) -> None:
    linear = base(generator)
    adapter = LoRALinear(linear, R, generator=generator)
    x = torch.randn(6, N, generator=generator)
    assert torch.equal(adapter(x), linear(x))
    assert not adapter.factors().delta_weight().any()
    assert float(adapter.right.detach().abs().max()) <= N**-0.5  # Kaiming-uniform bound
    assert float(adapter.right.detach().std()) == pytest.approx((3 * N) ** -0.5, rel=0.15)  # 80 draws: 8 % deviation


def test_alpha_defaults_to_the_rank_so_that_the_scaling_is_one(generator: torch.Generator) -> None:
    assert LoRALinear(base(generator), 3, generator=generator).scaling == 1.0
    assert LoRALinear(base(generator), 4, alpha=32.0, generator=generator).scaling == 8.0
    assert repr(LoRALinear(base(generator), 4, alpha=32.0)).startswith("LoRALinear(\n  rank=4, alpha=32\n")


@pytest.mark.parametrize("kind", [EBLoRALinear, LoRALinear])
def test_a_numerator_that_is_not_finite_is_refused(kind: type[Adapter], generator: torch.Generator) -> None:
    layer = nn.Linear(6, 5)
    with pytest.raises(ValueError, match=r"alpha .*got nan"):
        kind(layer, 2, alpha=float("nan"))
    assert layer.weight.requires_grad  # refused before the base is frozen


@pytest.mark.parametrize("kind", [EBLoRALinear, LoRALinear])
def test_a_rank_that_does_not_fit_the_weight_is_refused(kind: type[Adapter], generator: torch.Generator) -> None:
    linear = base(generator)
    with pytest.raises(ValueError, match=r"rank 13 does not fit a weight of shape \(12, 20\): choose 1 to 12"):
        kind(linear, 13)
    with pytest.raises(ValueError, match="rank 0 does not fit"):
        kind(linear, 0)
    assert kind(linear, 12).left.shape == (12, 12)


def test_a_rank_above_the_room_outside_the_complement_is_refused(generator: torch.Generator) -> None:
    linear, protected = base(generator), directions(generator, k=17)
    message = r"complement leaves 3 free directions in R\^20, too few for rank 4: lower the rank or the energy"
    with pytest.raises(ValueError, match=message):
        EBLoRALinear(linear, 4, complement=protected)
    assert EBLoRALinear(linear, 3, complement=protected, generator=generator).right.shape == (20, 3)


def test_only_linear_layers_can_be_adapted() -> None:
    with pytest.raises(TypeError, match=r"adapters wrap nn\.Linear \(or GPT-2's Conv1D\), got Conv1d"):
        LoRALinear(nn.Conv1d(3, 3, 1), 1)  # type: ignore[arg-type]


def test_point_along_takes_the_nearest_frames_outside_the_complement(generator: torch.Generator) -> None:
    protected = directions(generator)
    adapter = EBLoRALinear(base(generator), R, complement=protected, generator=generator)
    left, right = torch.randn(M, R, generator=generator), torch.randn(N, R, generator=generator)
    adapter.point_along(left.double(), right)
    for found, wanted in ((adapter.left, left), (adapter.right, protected.project_out(right))):
        u, _, vt = torch.linalg.svd(wanted.double(), full_matrices=False)
        torch.testing.assert_close(found.detach().double(), u @ vt, rtol=0, atol=1e-6)  # polar factor, float32
    error = adapter.right_manifold.constraint_error(adapter.right)
    assert error.protection <= 2e-6  # float32
    assert error.orthonormality <= 2e-6


def test_a_start_with_too_few_directions_is_completed_not_refused(generator: torch.Generator) -> None:
    """A gradient of low rank, or one that lies in the protected subspace, leaves columns without a direction."""
    axes = torch.eye(N)[:, :6]
    adapter = EBLoRALinear(base(generator), R, complement=axes, generator=generator)
    right = torch.zeros(N, R)
    right[10, 0] = right[0, 1] = right[1, 2] = 1.0  # one free direction, two protected ones, one missing
    adapter.point_along(torch.zeros(M, R), right)
    for manifold, point in ((adapter.left_manifold, adapter.left), (adapter.right_manifold, adapter.right)):
        error = manifold.constraint_error(point)
        assert error.orthonormality <= 2e-6  # float32
        assert error.protection <= 2e-6
    assert float(adapter.right[10].detach().norm()) == pytest.approx(1.0, abs=1e-3)  # the free direction is kept


def test_a_descent_start_lowers_the_loss(generator: torch.Generator) -> None:
    """A negative scale along the gradient's leading directions is a step downhill."""
    linear = base(generator)
    x, y = torch.randn(64, N, generator=generator), torch.randn(64, M, generator=generator)
    linear.weight.requires_grad_(True)
    before = (linear(x) - y).square().mean()
    (gradient,) = torch.autograd.grad(before, linear.weight)
    left, _, vt = torch.linalg.svd(gradient)
    adapter = EBLoRALinear(linear, R, initial_scale=-0.005, generator=generator)
    adapter.point_along(left[:, :R], vt[:R].T)
    after = (adapter(x) - y).square().mean()
    # First order: scale times the sum of the leading singular values.
    slope = 0.005 * float(torch.linalg.svdvals(gradient)[:R].sum())
    assert float(before.detach() - after.detach()) == pytest.approx(slope, rel=0.05)  # second order is small here


def toy(generator: torch.Generator) -> nn.Module:
    model = nn.Sequential(base(generator), nn.Tanh(), base(generator, 5, M))
    protected = directions(generator)
    inject_adapters(model, ["0"], lambda _, linear: EBLoRALinear(linear, R, complement=protected, generator=generator))
    return model


def test_the_state_dict_carries_factors_scale_complement_and_base(generator: torch.Generator) -> None:
    model, other = toy(generator), toy(generator)
    state = model.state_dict()
    assert sorted(state) == [
        "0.base.bias",
        "0.base.weight",
        "0.left",
        "0.right",
        "0.right_manifold.complement",
        "0.scale",
        "2.bias",
        "2.weight",
    ]
    x = torch.randn(3, N, generator=generator)
    assert not torch.equal(model(x), other(x))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_trains_alone_on_its_own_manifolds(way: str, generator: torch.Generator) -> None:
    model = toy(generator)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    x = torch.randn(30, N, generator=generator)
    before = model(x).detach()
    assert torch.equal(twin(x), before)
    optimizer = RiemannianAdamW(param_groups(twin, lr=0.05), weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        twin(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model(x), before)
    assert float((twin(x) - before).detach().abs().max()) > 0.01
    (adapter,) = adapters_of(twin).values()
    assert isinstance(adapter, EBLoRALinear)
    error = adapter.right_manifold.constraint_error(adapter.right)
    assert max(error) <= 2e-6  # float32
    assert adapter.right_manifold.k == 6


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half()], ids=["bfloat16", "half"])
def test_a_converted_model_keeps_float32_factors_and_complement(
    convert: Callable[[nn.Module], nn.Module], generator: torch.Generator
) -> None:
    model = toy(generator)
    (adapter,) = adapters_of(model).values()
    assert isinstance(adapter, EBLoRALinear)
    before = {name: tensor.clone() for name, tensor in adapter.own_tensors()}
    assert convert(model) is model
    assert {p.dtype for p in adapter.base.parameters()} < {torch.bfloat16, torch.float16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.own_tensors())  # not one rounding
    complement = adapter.right_manifold.complement
    assert complement is not None
    gram = complement.double().T @ complement.double()
    assert float((gram - torch.eye(6)).abs().max()) < 1e-6  # float32 rounding; bfloat16 would leave 3.5e-3
    RiemannianAdamW(param_groups(model, lr=0.1), weight_decay=0.0)
    assert model.double()[0].left.dtype == torch.float64  # wider is granted
    assert model.to("meta")[0].left.device.type == "meta"


def test_factors_that_were_forced_into_half_precision_are_refused(generator: torch.Generator, tmp_path: Path) -> None:
    model = toy(generator)
    (adapter,) = adapters_of(model).values()
    adapter.left.data = adapter.left.data.half()
    message = r"a point on RestrictedStiefel is kept in float32 or float64, got torch\.float16: .* keep the factors"
    with pytest.raises(TypeError, match=message):
        RiemannianAdamW(param_groups(model, lr=0.1))
    with pytest.raises(TypeError, match=r"0\.left is torch\.float16: factors are kept in float32, rounding them costs"):
        save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_factors_are_detached_views_of_the_parameters(generator: torch.Generator) -> None:
    adapter = adapter_of("eblora", base(generator), generator)
    factors = adapter.factors()
    assert isinstance(factors, Factors)
    assert factors.left.data_ptr() == adapter.left.data_ptr()
    assert not factors.left.requires_grad
    assert not factors.magnitude.requires_grad


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("core", ["scalar", "diagonal", "full"])
def test_factors_are_float32_whatever_the_default_dtype_is(
    default: torch.dtype, core: Any, generator: torch.Generator
) -> None:
    layer = base(generator)
    try:
        torch.set_default_dtype(default)
        balanced, plain = EBLoRALinear(layer, R, core=core, generator=generator), LoRALinear(layer, R)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in [*balanced.parameters(), *plain.parameters()]} == {torch.float32}
    assert plain.magnitude().dtype == torch.float32
    assert max(balanced.left_manifold.constraint_error(balanced.left)) <= 2e-6


def test_a_frame_starts_along_as_many_columns_as_it_has(generator: torch.Generator) -> None:
    adapter = EBLoRALinear(base(generator), R)
    before = adapter.left.detach().clone()
    with pytest.raises(ValueError, match=r"a frame of shape \(12, 4\) cannot start along \(12, 1\)"):
        adapter.point_along(torch.ones(M, 1), torch.ones(N, 1))
    assert torch.equal(adapter.left, before)


def test_a_layer_that_gets_no_adapter_is_left_as_it_was(generator: torch.Generator) -> None:
    layer = base(generator)
    with pytest.raises(ValueError, match="leaves 2 free directions"):
        EBLoRALinear(layer, R, complement=directions(generator, k=N - 2))
    assert all(p.requires_grad for p in layer.parameters())


def test_a_layer_without_memory_yet_takes_an_adapter(generator: torch.Generator) -> None:
    with torch.device("meta"):
        layer = nn.Linear(N, M)
    adapter = EBLoRALinear(layer, R, complement=directions(generator))
    assert {p.device.type for p in adapter.parameters()} == {"meta"}
