"""Spectral steps of plain LoRA's factors: their length, their invariances, what they avoid, and what they store."""

import copy
from typing import Any

import pytest
import torch
from baseline_runs import OPTIONS, stage
from old_versions import needs_muon
from torch import Tensor, nn
from toy import frozen_model

from manifold_cl import adapters_of
from manifold_cl.continual import AdditionalParameters, make_method
from manifold_cl.continual.methods.factor_optimizers import MuonOnFactors, PairMuon, steepest_factor
from manifold_cl.geometry import ProtectedSubspace

M, N, RANK, LR = 30, 40, 5, 0.3
QUINTIC = (0.5, 1.5)
"""What torch's five Newton-Schulz steps in bfloat16 make of singular values, as its docstring states."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conditioned(rows: int, decades: float, seed: int) -> Tensor:
    """A factor whose singular values lie about ``decades`` powers of ten apart, in no special basis."""
    turn = torch.linalg.qr(draw(RANK, RANK, seed=seed + 50))[0]
    return draw(rows, RANK, seed=seed) * torch.logspace(0, -decades, RANK, dtype=torch.float64) @ turn


def spectral_norm(a: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a.double(), 2))


def one_step(left: Tensor, right: Tensor, gradient: Tensor, steps: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """The displacements of both factors under the loss ``⟨gradient, L Rᵀ⟩``."""
    params = nn.Parameter(left.clone()), nn.Parameter(right.clone())
    optimizer = PairMuon([params], lr=LR, **options)
    for _ in range(steps):
        params[0].grad, params[1].grad = gradient @ params[1].detach(), gradient.mT @ params[0].detach()
        optimizer.step()
    return params[0].detach() - left, params[1].detach() - right


@pytest.mark.parametrize("decades", [0, 2, 4])
def test_each_factor_moves_the_product_by_half_the_rate_whatever_the_condition(decades: int) -> None:
    left, right = conditioned(M, decades, 1), conditioned(N, decades, 2)
    d_left, d_right = one_step(left, right, draw(M, N, seed=3))
    assert spectral_norm(d_left @ right.mT) == pytest.approx(LR / 2, rel=1e-6)  # float64 times a condition of 1e4
    assert spectral_norm(left @ d_right.mT) == pytest.approx(LR / 2, rel=1e-6)
    assert float((draw(M, N, seed=3) * (d_left @ right.mT + left @ d_right.mT)).sum()) < 0


def test_the_first_step_of_the_product_does_not_depend_on_the_basis_of_the_factors() -> None:
    left, right, gradient, change = draw(M, RANK, seed=1), draw(N, RANK, seed=2), draw(M, N, seed=3), draw(RANK, RANK)
    assert float(torch.linalg.cond(change)) > 3
    other_left, other_right = left @ change, right @ torch.linalg.inv(change).mT
    d_left, d_right = one_step(left, right, gradient)
    e_left, e_right = one_step(other_left, other_right, gradient)
    expected = d_left @ right.mT + left @ d_right.mT
    torch.testing.assert_close(e_left @ other_right.mT + other_left @ e_right.mT, expected, rtol=0, atol=1e-10)


def test_no_other_step_of_the_same_length_is_steeper() -> None:
    """The dense problem of each factor: ``⟨M, D⟩`` is largest at the bound, the nuclear norm of ``m S^(-1/2)``."""
    average, other = draw(M, RANK, seed=4), conditioned(N, 2, 5)
    direction = steepest_factor(average, other)
    best = float((average * direction).sum())
    assert spectral_norm(direction @ other.mT) == pytest.approx(1, rel=1e-9)
    _, r = torch.linalg.qr(other)  # D = Z r⁻ᵀ has |D otherᵀ|₂ = |Z|₂
    bound = float(torch.linalg.matrix_norm(average @ torch.linalg.inv(r), "nuc"))
    assert best == pytest.approx(bound, rel=1e-8)
    for seed in range(50):
        rival = draw(M, RANK, seed=100 + seed) @ torch.linalg.inv(r).mT
        assert float((average * rival).sum()) / spectral_norm(rival @ other.mT) < best


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("kind", ["pair", pytest.param("torch", marks=needs_muon)])
def test_steps_do_not_depend_on_the_unit_of_the_loss(kind: str, factor: float) -> None:
    def moved(scale: float) -> list[Tensor]:
        left, right = (nn.Parameter(draw(rows, RANK, seed=rows, dtype=torch.float32)) for rows in (M, N))
        optimizer: Any = PairMuon([(left, right)], lr=LR) if kind == "pair" else MuonOnFactors([left, right], lr=LR)
        for seed in range(3):
            for p in (left, right):
                p.grad = scale * draw(*p.shape, seed=seed, dtype=torch.float32)
            optimizer.step()
        return [left.detach(), right.detach()]

    for ours, scaled in zip(moved(1.0), moved(factor), strict=True):
        assert torch.equal(ours, scaled)  # a power of two: no rounding differs


@pytest.mark.parametrize("name", ["lora_muon", "lora_muon_ogd"])
def test_the_first_step_moves_the_output_factor_alone_and_all_its_directions_equally(name: str) -> None:
    method, model = make_method(name, **OPTIONS[name]), frozen_model()
    method.begin_task(model, stage())
    before = {layer: adapter.right.detach().clone() for layer, adapter in adapters_of(model).items()}
    optimizer = method.make_optimizer(model)
    batch = next(stage().task.batches("train", batch_size=96))
    method.loss(model, stage().task, batch).backward()
    optimizer.step()
    for layer, adapter in adapters_of(model).items():
        assert torch.equal(adapter.right, before[layer])  # its gradient is zero, and so is its step: no NaN
        if name == "lora_muon":
            sigma = torch.linalg.svdvals(adapter.left.detach()) / (method.lr * 0.2 * adapter.out_features**0.5)
            assert QUINTIC[0] < float(sigma.min()) <= float(sigma.max()) < QUINTIC[1]
        else:
            sigma = torch.linalg.svdvals((adapter.left @ adapter.right.mT).detach())[: method.rank] / (method.lr / 2)
            torch.testing.assert_close(sigma, torch.ones(method.rank), rtol=0, atol=1e-5)  # float32


def test_zero_gradients_move_nothing() -> None:
    left, right = draw(M, RANK, seed=1), draw(N, RANK, seed=2)
    d_left, d_right = one_step(left, right, torch.zeros(M, N, dtype=torch.float64))
    assert not d_left.any()
    assert not d_right.any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_the_input_factor_never_enters_the_protected_directions(weight_decay: float) -> None:
    basis = torch.linalg.qr(draw(N, 9, seed=6))[0].float()
    protected = ProtectedSubspace(basis)
    left = nn.Parameter(torch.zeros(M, RANK))
    right = nn.Parameter(protected.project_out(draw(N, RANK, seed=7).float() / N**0.5))
    optimizer = PairMuon([(left, right)], lr=0.1, weight_decay=weight_decay, protected=[protected])
    target = draw(M, N, seed=8).float()
    for step in range(200):
        before = left.detach().clone(), right.detach().clone()
        optimizer.zero_grad()
        (left @ right.mT - target).square().sum().backward()
        assert step == 0 or float((basis.mT @ right.grad).abs().max()) > 1e-3  # the gradient has such a part
        optimizer.step()
        d_left, d_right = left.detach() - before[0], right.detach() - before[1]
        first_order = d_left @ before[1].mT + before[0] @ d_right.mT
        for inside in (basis.mT @ right.detach(), first_order @ basis, left.detach() @ right.detach().mT @ basis):
            assert float(inside.abs().max()) <= 1e-6
    assert float((left @ right.mT).detach().norm()) > 1


def test_decay_shrinks_the_product_and_not_the_step() -> None:
    """At ``lr · weight_decay = 0.09`` the product loses 9 % and moves by the step of no decay, to first order."""
    left, right, gradient = draw(M, RANK, seed=1), draw(N, RANK, seed=2), draw(M, N, seed=3)
    plain = one_step(left, right, gradient)
    decayed = one_step(left, right, gradient, weight_decay=0.3)
    new_left, new_right = left + decayed[0], right + decayed[1]
    second_order = plain[0] @ plain[1].mT / (1 - 0.3 * LR)
    expected = (1 - 0.3 * LR) * left @ right.mT + plain[0] @ right.mT + left @ plain[1].mT + second_order
    torch.testing.assert_close(new_left @ new_right.mT, expected, rtol=0, atol=1e-10)


@needs_muon
def test_the_same_numbers_after_a_state_dict() -> None:
    """Both optimizers with a head beside the factors, saved and loaded in the middle, bit for bit."""
    for name in ("lora_muon", "lora_muon_ogd"):
        method, model = make_method(name, **OPTIONS[name]), frozen_model()
        method.begin_task(model, stage())
        batches = list(stage().task.batches("train", batch_size=16))
        beside = AdditionalParameters("head.weight", lr=1e-2, weight_decay=0.1)
        optimizer = method.make_optimizer(model)
        beside.add_to(optimizer, model, 0)
        start = model.head.weight.detach().clone()
        twin = None
        for step, batch in enumerate(batches):
            for each, its_optimizer in [(model, optimizer), *([twin] if twin else [])]:
                its_optimizer.zero_grad()
                method.loss(each, stage().task, batch).backward()
                its_optimizer.step()
            if step == 2:
                other = copy.deepcopy(model)
                resumed = method.make_optimizer(other)
                beside.add_to(resumed, other, 0)
                resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch keeps the tensors
                twin = (other, resumed)
        assert twin is not None
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin[0].parameters(), strict=True))
        state = optimizer.state_dict()
        assert len(state["state"]) == 5  # two layers of two factors, one head
        assert set(state["state"][4]) == {"step", "exp_avg", "exp_avg_sq"}
        assert not torch.equal(model.head.weight, start)


def test_parameters_beside_the_factors_step_as_in_adamw() -> None:
    factors = [nn.Parameter(draw(M, RANK, dtype=torch.float32)), nn.Parameter(draw(N, RANK, dtype=torch.float32))]
    ours, theirs = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = PairMuon([(factors[0], factors[1])], lr=LR)
    optimizer.add_param_group({"params": [ours], "lr": 0.1, "weight_decay": 0.2})
    adamw = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2)
    for seed in range(5):
        ours.grad = draw(4, 3, seed=seed, dtype=torch.float32)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"need a rate of their own: give lr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": [(torch.ones(4, 2), torch.ones(5, 3))]}, r"one r, got \(4, 2\) and \(5, 3\)"),
        ({"pairs": [(torch.ones(4), torch.ones(5, 3))]}, r"got \(4,\) and \(5, 3\)"),
        ({"momentum": 1.0}, r"momentum is a share in \[0, 1\), got 1\.0"),
        ({"weight_decay": -0.1}, r"got 0\.1 and -0\.1"),
        ({"weight_decay": 20.0}, r"a product below 1, got 0\.1 and 20\.0"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairMuon(**{"pairs": [(torch.ones(4, 2), torch.ones(5, 2))], "lr": 0.1, **change})


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    left, right = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(5, 2))
    optimizer = PairMuon([(left, right)], lr=0.1)
    left.grad, right.grad = torch.ones(4, 2), torch.full((5, 2), torch.nan)
    with pytest.raises(ValueError, match=r"gradient of a factor of shape \(5, 2\) is not finite"):
        optimizer.step()
    assert torch.equal(left, torch.ones(4, 2))
    assert not optimizer.state_dict()["state"]


def test_a_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from manifold_cl.continual.methods import factor_optimizers

    monkeypatch.setattr(factor_optimizers, "Muon", torch.optim.Optimizer)
    with pytest.raises(RuntimeError, match=r"has no torch\.optim\.Muon: install torch 2\.9 or later"):
        MuonOnFactors([torch.ones(4, 2)], lr=0.1)


@needs_muon
def test_a_vector_is_no_factor() -> None:
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        MuonOnFactors([torch.ones(4)], lr=0.1)
