"""Laws of the optimizers: constraints, batches, invariances, the slow twin, and steps that are refused or undone."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from property_cases import PROMISE, Case, cases, close, double, holds_for

from manifold_cl import RETRACTIONS, RestrictedStiefel, RiemannianAdamW, RiemannianSGD
from manifold_cl.infeasible import INFEASIBLE_STEPS, infeasible
from manifold_cl.optim import RiemannianAdam, RiemannianMuon

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
from slow_step import SlowAdamW

KINDS = {
    "sgd": (RiemannianSGD, {}),
    "momentum": (RiemannianSGD, {"momentum": 0.9}),
    "adamw": (RiemannianAdamW, {"weight_decay": 0.0}),
    "official": (RiemannianAdamW, {"weight_decay": 0.0, "step_rule": "official"}),
    "transport": (RiemannianAdamW, {"weight_decay": 0.0, "moments": "transport"}),
    "adam": (RiemannianAdam, {}),
    **{f"muon_{name}": (RiemannianMuon, {"direction": name}) for name in ("exact", "spel", "projected", "intrinsic")},
}
kinds = st.sampled_from(sorted(KINDS))
rates = st.sampled_from([1e-20, 1e-6, 1e-3, 0.1, 1.0, 30.0, 1e4])
usual_rates = st.sampled_from([1e-3, 0.03, 0.3])
gradient_sizes = st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15])


def made(kind, points, manifolds, rate, **options):
    base, own = KINDS[kind]
    return base([{"params": points, "manifolds": manifolds}], lr=rate, **own, **options)


def problem(case: Case, **options):
    """A parameter on its manifold, and a function that gives the next gradient."""
    manifold = case.manifold(**options)
    point = torch.nn.Parameter(case.point(manifold))
    return manifold, point, lambda: case.gaussian(*point.shape)


@holds_for(200, case=cases(), kind=kinds, rate=rates, size=gradient_sizes)
def test_every_step_of_every_length_ends_on_the_manifold(case, kind, rate, size):
    manifold, point, gradient = problem(case)
    optimizer = made(kind, [point], [manifold], rate)
    for _ in range(3):
        point.grad = size * gradient()
        optimizer.step()
        assert max(manifold.constraint_error(point.detach())) <= PROMISE[case.dtype]


@holds_for(case=cases(), name=st.sampled_from(sorted(RETRACTIONS)), rate=rates)
def test_every_retraction_keeps_an_optimizer_on_the_manifold(case, name, rate):
    manifold, point, gradient = problem(case, retraction=name)
    optimizer = made("adamw", [point], [manifold], rate)
    for _ in range(2):
        point.grad = gradient()
        optimizer.step()
        assert max(manifold.constraint_error(point.detach())) <= PROMISE[case.dtype]


@holds_for(60, case=double(batches=((),)), kind=kinds, rate=usual_rates, count=st.integers(2, 4))
def test_points_with_different_protected_directions_step_together_as_they_do_alone(case, kind, rate, count):
    draws = [Case(case.n, case.p, max(case.k - i, 0), (), case.dtype, case.seed + i) for i in range(count)]
    problems = [problem(each) for each in draws]
    alone = [(manifold, torch.nn.Parameter(point.detach().clone())) for manifold, point, _ in problems]
    together = made(kind, [p for _, p, _ in problems], [m for m, _, _ in problems], rate)
    single = [made(kind, [p], [m], rate) for m, p in alone]
    for _ in range(2):
        for (_, point, gradient), (_, twin), optimizer in zip(problems, alone, single, strict=True):
            point.grad = gradient()
            twin.grad = point.grad.clone()
            optimizer.step()
        together.step()
    for (_, point, _), (_, twin) in zip(problems, alone, strict=True):
        close(point.detach(), twin.detach(), 1e-10)


@holds_for(case=double(batches=((),)), official=st.booleans(), rate=usual_rates)
def test_adamw_equals_its_slow_twin(case, official, rate):
    manifold, point, gradient = problem(case)
    optimizer = RiemannianAdamW(
        [{"params": [point], "manifolds": [manifold]}],
        lr=rate / 30,
        weight_decay=0.0,
        step_rule="official" if official else "corrected",
    )
    twin = SlowAdamW(point.detach(), manifold.complement, lr=rate / 30, official=official)
    for _ in range(3):
        point.grad = gradient()
        g = twin.canonical(point.grad) if official else twin.tangent(point.grad)
        if float(g.abs().min()) < 1e-4:
            return  # Adam's first step is the sign of an entry, which rounding decides
        twin.step(point.grad.clone())
        optimizer.step()
        close(point.detach(), twin.x, 1e-9)


@holds_for(
    60, case=double(batches=((),)), kind=st.sampled_from(["sgd", "momentum", "adam", "muon_exact"]), rate=usual_rates
)
def test_steps_commute_with_rotations_of_the_basis_where_promised(case, kind, rate):
    manifold, point, gradient = problem(case)
    o = case.orthogonal(case.p)
    turned = torch.nn.Parameter(point.detach() @ o)
    optimizers = [made(kind, [p], [manifold], rate) for p in (point, turned)]
    for _ in range(2):
        point.grad = gradient()
        if float(torch.linalg.matrix_norm(manifold.proju(point.detach(), point.grad))) < 1e-3:
            return  # no vector is tangent: rounding has no direction
        turned.grad = point.grad @ o
        for optimizer in optimizers:
            optimizer.step()
    close(turned.detach(), point.detach() @ o, 1e-7)


@holds_for(
    60,
    case=double(batches=((),)),
    kind=st.sampled_from(["adam", "muon_exact", "muon_intrinsic"]),
    factor=st.sampled_from([1e-6, 7.0, 1e6]),
)
def test_the_size_of_gradients_does_not_matter_where_steps_are_normalised(case, kind, factor):
    manifold, point, gradient = problem(case)
    other = torch.nn.Parameter(point.detach().clone())
    options = {"eps": 0.0} if kind == "adam" else {}
    optimizers = [made(kind, [p], [manifold], 0.05, **options) for p in (point, other)]
    point.grad = gradient()
    if float(torch.linalg.matrix_norm(manifold.proju(point.detach(), point.grad))) < 1e-3:
        return  # no vector is tangent: rounding has no direction
    other.grad = factor * point.grad
    for optimizer in optimizers:
        optimizer.step()
    close(other.detach(), point.detach(), 1e-8)


@holds_for(60, case=double(), kind=kinds, rate=usual_rates)
def test_maximising_is_minimising_the_opposite(case, kind, rate):
    manifold, point, gradient = problem(case)
    other = torch.nn.Parameter(point.detach().clone())
    down, up = made(kind, [point], [manifold], rate), made(kind, [other], [manifold], rate, maximize=True)
    point.grad = gradient()
    other.grad = -point.grad
    down.step()
    up.step()
    close(other.detach(), point.detach(), 1e-12)


@holds_for(case=cases(), kind=kinds, bad=st.sampled_from(["nan", "inf", "-inf"]), skip=st.booleans())
def test_a_gradient_that_is_not_finite_changes_nothing(case, kind, bad, skip):
    manifold, point, gradient = problem(case)
    optimizer = made(kind, [point], [manifold], 0.1, nonfinite="skip" if skip else "refuse")
    point.grad = gradient()
    optimizer.step()
    before, state = point.detach().clone(), copy.deepcopy(optimizer.state_dict())
    point.grad = gradient()
    point.grad.view(-1)[case.seed % point.numel()] = float(bad)
    if skip:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    else:
        with pytest.raises(ValueError, match="NaN or infinite"):
            optimizer.step()
    assert torch.equal(point.detach(), before)
    assert str(optimizer.state_dict()["state"]) == str(state["state"])


@holds_for(60, case=cases(), kind=kinds, rate=usual_rates)
def test_a_saved_state_goes_on_to_the_same_bits(case, kind, rate):
    manifold, point, gradient = problem(case)
    optimizer = made(kind, [point], [manifold], rate)
    point.grad = gradient()
    optimizer.step()
    other = torch.nn.Parameter(point.detach().clone())
    resumed = made(kind, [other], [manifold], rate)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        point.grad = gradient()
        other.grad = point.grad.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(other.detach(), point.detach())


@holds_for(case=cases(), rate=rates)
def test_without_a_gradient_part_that_is_tangent_a_point_stays(case, rate):
    manifold, point, _ = problem(case)
    before = point.detach().clone()
    optimizer = made("sgd", [point], [manifold], min(rate, 1.0))
    symmetric = case.gaussian(*case.batch, case.p, case.p)
    point.grad = before @ (symmetric + symmetric.mT)  # normal to the manifold
    optimizer.step()
    close(point.detach(), before, 5e-6 if case.dtype == torch.float32 else 1e-13)


@holds_for(case=cases(), name=st.sampled_from(sorted(INFEASIBLE_STEPS)), rate=st.sampled_from([1e-12, 1e-4, 1e-2]))
def test_steps_without_a_retraction_keep_off_the_protected_directions(case, name, rate):
    manifold, point, gradient = problem(case)
    optimizer = infeasible(torch.optim.SGD, step=name)([{"params": [point], "manifolds": [manifold]}], lr=rate)
    for _ in range(3):
        point.grad = gradient()
        optimizer.step()
    found = manifold.constraint_error(point.detach())
    assert found.protection <= PROMISE[case.dtype]
    assert found.orthonormality <= 0.1
    optimizer.return_to_manifold()
    assert max(manifold.constraint_error(point.detach())) <= PROMISE[case.dtype]


@holds_for(40, case=cases(batches=((),)), wrong=st.sampled_from(["half", "shape", "option", "rate", "manifolds"]))
def test_wrong_input_is_refused(case, wrong):
    manifold, point, gradient = problem(case)
    if wrong == "half":
        with pytest.raises(TypeError, match=r"float32 or float64, got torch\.float16"):
            made("adamw", [torch.nn.Parameter(point.detach().half())], [manifold], 0.1)
    elif wrong == "shape":
        tall = torch.nn.Parameter(case.gaussian(case.n + 1, case.n + 2))
        with pytest.raises(ValueError, match=r"rows here|free directions"):
            made("adamw", [tall], [manifold], 0.1)
    elif wrong == "option":
        with pytest.raises(ValueError, match="moments is one of"):
            made("adamw", [point], [manifold], 0.1, moments="kept")
    elif wrong == "rate":
        optimizer = made("adamw", [point], [manifold], 0.1)
        optimizer.param_groups[0]["lr"] = float("nan")
        point.grad, before = gradient(), point.detach().clone()
        with pytest.raises(ValueError, match="lr is nan"):
            optimizer.step()
        assert torch.equal(point.detach(), before)
    else:
        with pytest.raises(ValueError, match="manifolds"):
            RiemannianAdamW([{"params": [point], "manifolds": [manifold, RestrictedStiefel()]}], lr=0.1)
