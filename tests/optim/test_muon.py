"""RiemannianMuon: what its directions promise, beside a plain loop, under long training and on wrong input."""

import copy
import pickle

import geoopt
import pytest
import torch
from old_versions import needs_muon
from torch import Tensor, nn

from manifold_cl import EBLoRALinear, RestrictedStiefel, inject_adapters, param_groups, riemannian
from manifold_cl.geometry import ScaledStiefel, tangent_lmo
from manifold_cl.optim import RiemannianAdam, RiemannianMuon
from manifold_cl.optim.own_bases import DIRECTIONS

directions = pytest.mark.parametrize("direction", DIRECTIONS)


def problem(*, n: int = 40, p: int = 5, k: int = 7, dtype=torch.float64, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    manifold = RestrictedStiefel(torch.randn(n, k, dtype=torch.float64, generator=draw))
    x = manifold.random(n, p, dtype=dtype, generator=draw).as_subclass(torch.Tensor)
    return manifold, nn.Parameter(x), torch.randn(n, p, dtype=dtype, generator=draw)


def optimizer_of(point: Tensor, manifold: RestrictedStiefel, **options) -> RiemannianMuon:
    return RiemannianMuon([{"params": [point], "manifolds": [manifold]}], **options)


def train(point: Tensor, target: Tensor, optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -(point * target).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses


def nuclear_norm_off(manifold: RestrictedStiefel, target: Tensor) -> float:
    """The largest ``⟨x, target⟩`` of any point x."""
    basis = manifold.complement.to(target)
    return float(torch.linalg.svdvals(target - basis @ (basis.mT @ target)).sum())


@directions
def test_a_first_step_is_what_its_formula_says(direction: str):
    manifold, point, target = problem()
    x, rate = point.detach().clone(), 0.1
    optimizer = optimizer_of(point, manifold, lr=rate, direction=direction)
    train(point, target, optimizer, 1)
    gradient = manifold.egrad2rgrad(x, -target)
    if direction in ("exact", "intrinsic"):
        norm = {"exact": "spectral", "intrinsic": "blocks"}[direction]
        expected = manifold.retr(x, -rate * tangent_lmo(x, gradient, norm=norm).direction)
    else:
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        step = -rate * (u @ v)
        if direction == "spel":
            left, _, right = torch.linalg.svd(x + step, full_matrices=False)
            expected = left @ right
        else:
            expected = manifold.retr(x, manifold.proju(x, step))
    torch.testing.assert_close(point.detach(), expected, rtol=0, atol=1e-12)


@directions
def test_a_step_turns_no_direction_further_than_its_rate(direction: str):
    manifold, point, target = problem()
    x = point.detach().clone()
    train(point, target, optimizer_of(point, manifold, lr=0.05, direction=direction), 1)
    cosines = torch.linalg.svdvals(x.mT @ point.detach())
    bound = {"intrinsic": 2**0.5}.get(direction, 1.0) * 0.05
    assert float(cosines.min().clamp(max=1).acos()) <= bound * 1.01


@directions
def test_three_hundred_steps_keep_both_constraints(direction: str):
    manifold, point, target = problem(n=96, p=8, k=30, dtype=torch.float32)
    optimizer = optimizer_of(point, manifold, lr=0.02, direction=direction)
    losses = train(point, target, optimizer, 300)
    assert max(optimizer.constraint_error()) <= 2e-6
    assert losses[-1] <= -0.99 * nuclear_norm_off(manifold, target)


@directions
def test_a_spectral_step_does_not_ask_for_the_units_of_the_loss(direction: str):
    ends = []
    for factor in (1.0, 1e-3):
        manifold, point, target = problem()
        train(point, factor * target, optimizer_of(point, manifold, direction=direction), 20)
        ends.append(point.detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


@directions
def test_points_in_one_bucket_step_as_they_would_alone(direction: str):
    cases = [problem(seed=seed) for seed in range(3)]
    together = RiemannianMuon(
        [{"params": [c[1] for c in cases], "manifolds": [c[0] for c in cases]}], direction=direction
    )
    alone = []
    for manifold, point, target in cases:
        twin = nn.Parameter(point.detach().clone())
        train(twin, target, optimizer_of(twin, manifold, direction=direction), 5)
        alone.append(twin)
    for _ in range(5):
        together.zero_grad()
        torch.stack([-(point * target).sum() for _, point, target in cases]).sum().backward()
        together.step()
    for (_, point, _), twin in zip(cases, alone, strict=True):
        torch.testing.assert_close(point, twin, rtol=0, atol=1e-12)


def test_other_parameters_step_as_in_adamw():
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
    inject_adapters(net, ["0"], lambda _, linear: EBLoRALinear(linear, 2, initial_scale=0.5))
    net[1].requires_grad_(True)
    groups = param_groups(net, lr=0.01, scale_lr=0.02, weight_decay=0.1)
    euclidean = [
        (p, group["lr"], group.get("weight_decay", 0.0))
        for group in groups
        if "manifolds" not in group
        for p in group["params"]
    ]
    twins = [
        {"params": [nn.Parameter(p.detach().clone())], "lr": lr, "weight_decay": decay} for p, lr, decay in euclidean
    ]
    assert len(twins) == 3  # magnitude, weight, bias
    plain, ours = torch.optim.AdamW(twins, lr=0.01), RiemannianMuon(groups)
    for _ in range(4):
        net(torch.randn(5, 12)).square().sum().backward()
        for twin, (p, _, _) in zip(twins, euclidean, strict=True):
            twin["params"][0].grad = p.grad.clone()
        ours.step()
        plain.step()
        ours.zero_grad()
    for twin, (p, _, _) in zip(twins, euclidean, strict=True):
        torch.testing.assert_close(p, twin["params"][0], rtol=1e-5, atol=1e-7)


@directions
def test_a_state_continues_to_the_bit(direction: str):
    manifold, point, target = problem()
    optimizer = optimizer_of(point, manifold, direction=direction, nesterov=True)
    train(point, target, optimizer, 3)
    other = nn.Parameter(point.detach().clone())
    resumed = optimizer_of(other, manifold, direction=direction, nesterov=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {"momentum_buffer"} == set(optimizer.state[point])
    pickled = pickle.loads(pickle.dumps(optimizer))
    (third,) = pickled.param_groups[0]["params"]
    for p, o in ((point, optimizer), (other, resumed), (third, pickled)):
        train(p, target, o, 3)
    assert torch.equal(point, other)
    assert torch.equal(point, third)


@pytest.mark.parametrize(
    ("adjust", "factor"), [("none", 1.0), ("original", (40 / 5) ** 0.5), ("match_rms_adamw", 0.2 * 40**0.5)]
)
def test_adjustments_are_those_of_torch(adjust: str, factor: float):
    ends = []
    for options in ({"lr": 0.01, "adjust": adjust}, {"lr": 0.01 * factor}):
        manifold, point, target = problem()
        train(point, target, optimizer_of(point, manifold, **options), 3)
        ends.append(point.detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-14)


@needs_muon
def test_torch_muon_itself_can_be_made_riemannian():
    manifold, point, target = problem(n=96, p=8, k=30, dtype=torch.float32)
    optimizer = riemannian(torch.optim.Muon)([{"params": [point], "manifolds": [manifold]}], lr=0.02, weight_decay=0.0)
    losses = train(point, target, optimizer, 300)
    assert max(optimizer.constraint_error()) <= 2e-6
    assert losses[-1] <= -0.95 * nuclear_norm_off(manifold, target)
    assert type(optimizer) is not RiemannianMuon


@directions
def test_a_zero_gradient_does_not_move_a_point(direction: str):
    manifold, point, target = problem()
    before = point.detach().clone()
    train(point, 0 * target, optimizer_of(point, manifold, direction=direction), 2)
    torch.testing.assert_close(point.detach(), before, rtol=0, atol=1e-15)


@directions
def test_a_gradient_that_is_not_finite_changes_nothing(direction: str):
    manifold, point, _ = problem()
    before = point.detach().clone()
    optimizer = optimizer_of(point, manifold, direction=direction)
    point.grad = torch.full_like(point, torch.nan)
    with pytest.raises(ValueError, match="1 of 1 points have NaN or infinite entries"):
        optimizer.step()
    assert torch.equal(point.detach(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "steepest"}, "direction is one of exact, spel, projected, intrinsic, got 'steepest'"),
        ({"adjust": "rms"}, "adjust is one of none, original, match_rms_adamw, got 'rms'"),
        ({"momentum": 1.0}, r"momentum is a share in \[0, 1\), got 1.0"),
        ({"lr": -1.0}, "lr is at least 0, got -1.0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    manifold, point, _ = problem()
    with pytest.raises(ValueError, match=message):
        optimizer_of(point, manifold, **options)


def test_half_precision_is_refused():
    manifold, point, _ = problem(dtype=torch.float32)
    with pytest.raises(TypeError, match="float32 or float64, got torch"):
        optimizer_of(nn.Parameter(point.detach().bfloat16()), manifold)


@pytest.mark.parametrize("manifold", [ScaledStiefel(3.0), geoopt.Sphere()])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_points_without_orthonormal_columns_take_the_projected_direction_only(manifold, direction: str):
    """At columns of length 3 the exact direction led uphill."""
    x = manifold.projx(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    point, target = geoopt.ManifoldParameter(x, manifold=manifold), torch.ones(12, 3)
    if direction != "projected":
        with pytest.raises(TypeError, match=rf"direction='{direction}' .* points of {type(manifold).__name__} do not"):
            RiemannianMuon([point], lr=0.05, direction=direction)
        return
    losses = train(point, target, RiemannianMuon([point], lr=0.05, direction=direction), 3)
    assert losses[0] > losses[1] > losses[2]


def test_orthonormal_points_of_geoopt_take_every_direction():
    point = geoopt.ManifoldParameter(torch.eye(12, 3), manifold=geoopt.EuclideanStiefel())
    losses = train(point, torch.ones(12, 3), RiemannianMuon([point], lr=0.05), 3)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("make", "option", "value", "problem_named"),
    [
        (RiemannianMuon, "direction", "exakt", "direction is one of exact, .*'exakt'"),
        (RiemannianMuon, "adjust", "orginal", "adjust is one of none, .*'orginal'"),
        (RiemannianMuon, "direction", "spel", "set tangent_post='none'"),
        (RiemannianAdam, "second_moment", "elment", "second_moment is one of matrix, .*'elment'"),
    ],
)
def test_an_option_of_a_base_that_is_set_later_is_validated_before_the_step(make, option, value, problem_named):
    """An unknown direction was taken for "projected", an unknown second moment for "element"."""
    manifold, point, target = problem()
    if value != "spel":
        with pytest.raises(ValueError, match=problem_named):
            make([{"params": [point], "manifolds": [manifold], option: value}], lr=0.1)
    optimizer = make([{"params": [point], "manifolds": [manifold]}], lr=0.1)
    train(point, target, optimizer, 1)
    x = point.detach().clone()
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=problem_named):
        train(point, target, optimizer, 1)
    assert torch.equal(point.detach(), x)


def test_the_direction_can_become_the_nearest_point_later():
    (manifold, point, target), (_, other, _) = problem(), problem()
    made, changed = optimizer_of(point, manifold, lr=0.3, direction="spel"), optimizer_of(other, manifold, lr=0.3)
    changed.param_groups[0].update(direction="spel", tangent_post="none")
    train(point, target, made, 2), train(other, target, changed, 2)
    assert torch.equal(point, other)
