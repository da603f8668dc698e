"""Frames of adapters are recognised from bare parameters, followed when layers replace manifolds, and guarded."""

import copy
import gc
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

from manifold_cl import (
    EBLoRALinear,
    RestrictedStiefel,
    RiemannianAdamW,
    RiemannianSGD,
    eblora_adapters,
    inject_adapters,
    merge_adapters,
    param_groups,
    riemannian,
)
from manifold_cl.adapters import retract_adapters
from manifold_cl.geometry import point_holders

X = torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
BASIS = torch.linalg.qr(torch.randn(10, 4, generator=torch.Generator().manual_seed(3))).Q


def network(*, seed: int = 0, protected: bool = True) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
    adapt(net, seed=seed, protected=protected)
    return net


def adapt(net: nn.Module, *, seed: int, protected: bool = True) -> None:
    memory = {"0": BASIS, "2": None} if protected else None
    draw = torch.Generator().manual_seed(seed)
    inject_adapters(net, ["0", "2"], eblora_adapters(rank=3, memory=memory, generator=draw))


def train(net: nn.Module, optimizer: Any, steps: int = 10) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (net(X) - Y).square().mean().backward()
        optimizer.step()


def error(net: nn.Module) -> float:
    return max(
        value
        for module in net.modules()
        if isinstance(module, EBLoRALinear)
        for _, frame, manifold in module.manifold_parameters()
        for value in manifold.constraint_error(frame)
    )


def test_bare_parameters_step_as_groups_with_manifolds_do() -> None:
    bare = network()
    grouped = copy.deepcopy(bare)
    first = RiemannianAdamW(bare.parameters(), lr=0.05, weight_decay=0.0)
    second = RiemannianAdamW(param_groups(grouped, lr=0.05), weight_decay=0.0)
    train(bare, first)
    train(grouped, second)
    assert error(bare) <= 2e-6  # float32 bound
    for a, b in zip(bare.parameters(), grouped.parameters(), strict=True):
        assert torch.equal(a, b)
    assert max(first.constraint_error()) == pytest.approx(error(bare))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam])
def test_every_riemannian_class_recognises_frames(base: type[torch.optim.Optimizer]) -> None:
    net = network()
    optimizer = riemannian(base)(
        [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}], lr=0.05
    )
    train(net, optimizer)
    assert error(net) <= 2e-6  # float32 bound


CHANGES: dict[str, Callable[[nn.Sequential], nn.Sequential]] = {
    "nothing": lambda net: net,
    "float64": lambda net: net.double().float(),
    "bfloat16": lambda net: net.to(torch.bfloat16).float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "assigned state": lambda net: (net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True), net)[1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_frames_are_recognised_after_what_replaces_parameters(change: Callable[[nn.Sequential], nn.Sequential]) -> None:
    net = change(network())
    for p in net.parameters():
        p.requires_grad_(p.requires_grad or p.ndim < 1)
    for module in (net[0], net[2]):
        module.left.requires_grad_(True)
        module.right.requires_grad_(True)
    train(net, RiemannianAdamW([p for p in net.parameters() if p.requires_grad], lr=0.05))
    assert error(net) <= 2e-6  # float32 bound


def test_parameters_that_are_swapped_in_a_group_are_recognised() -> None:
    net = network()
    optimizer = RiemannianAdamW(param_groups(net, lr=0.05), weight_decay=0.0)
    train(net, optimizer)
    merge_adapters(net)
    adapt(net, seed=5)
    optimizer.state = defaultdict(dict)
    del optimizer.param_groups[1:]
    optimizer.param_groups[0]["params"] = [p for p in net.parameters() if p.requires_grad]
    train(net, optimizer)
    assert error(net) <= 2e-6  # float32 bound
    with torch.no_grad():
        net[0].left.mul_(1.5)
    with pytest.warns(UserWarning, match="points have left their manifold"):
        found = optimizer.constraint_error()
    assert found.orthonormality == pytest.approx(1.25)  # of the new points, not of those that were swapped out


@pytest.mark.parametrize("grouped", [True, False])
def test_a_manifold_that_its_layer_replaces_holds_from_the_next_step(grouped: bool) -> None:
    net = network(protected=False)
    optimizer = RiemannianAdamW(param_groups(net, lr=0.05) if grouped else net.parameters(), lr=0.05)
    train(net, optimizer, 3)
    later = RestrictedStiefel(BASIS)
    net[0].right_manifold = later
    with torch.no_grad():
        net[0].right.copy_(later.projx(net[0].right))
    assert optimizer.manifold_of(net[0].right) is not later  # looked at when it steps
    train(net, optimizer, 3)
    assert optimizer.manifold_of(net[0].right) is later
    assert error(net) <= 2e-6  # float32 bound
    later.complement = torch.cat([BASIS, torch.linalg.qr(BASIS, mode="complete").Q[:, 4:6]], dim=1)
    with torch.no_grad():
        net[0].right.copy_(later.projx(net[0].right))
    train(net, optimizer, 3)
    assert later.k == 6
    assert error(net) <= 2e-6


def test_a_manifold_that_the_caller_chose_stays() -> None:
    net = network(protected=False)
    own = RestrictedStiefel(BASIS)
    with torch.no_grad():
        net[0].right.copy_(own.projx(net[0].right))
    optimizer = RiemannianSGD([{"params": [net[0].right], "manifolds": [own]}], lr=0.1)
    train(net, optimizer, 3)
    assert optimizer.manifold_of(net[0].right) is own
    assert own.constraint_error(net[0].right).protection <= 2e-6  # float32 bound


ORDINARY: dict[str, Callable[[list[Tensor]], Any]] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "SGD": lambda ps: torch.optim.SGD([{"params": ps[:1]}, {"params": ps[1:]}], lr=0.01),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "RiemannianAdam": lambda ps: geoopt.optim.RiemannianAdam(ps, lr=0.01),  # geoopt's takes frames for Euclidean
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_optimizer_is_refused_on_frames_before_anything_moves(name: str) -> None:
    net = network()
    optimizer = ORDINARY[name]([p for p in net.parameters() if p.requires_grad])
    (net(X) - Y).square().mean().backward()
    before = [p.detach().clone() for p in net.parameters()]
    message = rf"{name} would move 4 frames off their manifolds, .*\(8, 3\).*RiemannianAdamW.*TrainerOptimizer"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    optimizer.keeps_manifolds = True  # said to keep them itself
    optimizer.step()
    assert error(net) > 2e-6  # as it was told


def test_frozen_frames_and_other_models_are_none_of_the_guards_business() -> None:
    net = network()
    for module in (net[0], net[2]):
        module.left.requires_grad_(False)
        module.right.requires_grad_(False)
    train(net, torch.optim.AdamW(net.parameters(), lr=0.01), 2)  # the scales train
    other = nn.Sequential(nn.Linear(10, 6))
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01), 2)


def test_points_that_a_riemannian_optimizer_steps_are_guarded_from_wrappers() -> None:
    manifold = RestrictedStiefel(BASIS)
    x = nn.Parameter(manifold.random(10, 3, generator=torch.Generator().manual_seed(0)).as_subclass(Tensor))
    inner = RiemannianAdamW([{"params": [x], "manifolds": [manifold]}], lr=0.1)

    class Averaging(torch.optim.Optimizer):
        """As Lookahead: steps, then interpolates."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})

        def step(self, closure: Any = None) -> None:
            raise AssertionError("the guard comes first")

    outer = Averaging(inner)
    x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match=r"Averaging would move 1 frames"):
        outer.step()
    geoopt_point = geoopt.ManifoldParameter(manifold.random(10, 3), manifold=manifold)
    geoopt_point.grad = torch.ones_like(geoopt_point)
    held = RiemannianAdamW([geoopt_point], lr=0.1)
    geoopt.optim.RiemannianSGD([geoopt_point], lr=0.1).step()  # it takes the manifold from the parameter
    assert max(held.constraint_error()) <= 2e-6  # float32 bound


def test_layers_are_forgotten_with_their_model() -> None:
    gc.collect()
    before = len(point_holders._layers)
    net = network()
    twin = copy.deepcopy(net)
    assert len(point_holders._layers) == before + 4
    del net, twin
    gc.collect()
    assert len(point_holders._layers) == before


def test_a_saved_optimizer_does_not_carry_the_layers_of_its_points() -> None:
    net = nn.Sequential(nn.Linear(400, 300))
    inject_adapters(net, ["0"], eblora_adapters(rank=2))
    optimizer = RiemannianAdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    net(torch.ones(2, 400)).sum().backward()
    optimizer.step()
    assert len(pickle.dumps(optimizer)) < 400 * 300  # bytes; the base weight alone takes four times as many
    again = pickle.loads(pickle.dumps(optimizer))
    assert [type(m).__name__ for m in again._riemannian.points.manifolds.values()] == ["RestrictedStiefel"] * 2


def test_a_gradient_may_be_zeroed_between_forward_and_backward() -> None:
    net = network()
    optimizer = RiemannianAdamW(param_groups(net, lr=0.05), weight_decay=0.0)
    for _ in range(2):
        loss = (net(X) - Y).square().mean()
        optimizer.zero_grad()  # as Lightning does
        loss.backward()  # raises where a frame was written to since
        optimizer.step()
    assert error(net) <= 2e-6  # float32 bound


def test_points_that_something_moved_before_the_first_step_are_named() -> None:
    """Frames that a framework initialises again, and the average of two models; the first step brings both back."""
    net, other = network(), network(seed=1)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.xavier_uniform_(p, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"before the first step \(orthonormality [\d.]+e[+-]\d+, .*retract_adapters"):
        train(net, RiemannianAdamW(net.parameters(), lr=0.05, weight_decay=0.0), 1)
    average = torch.optim.swa_utils.AveragedModel(network())
    for model in (network(), other):
        average.update_parameters(model)
    optimizer = RiemannianAdamW(average.parameters(), lr=0.05, weight_decay=0.0)
    with pytest.warns(UserWarning, match="off their manifold before the first step"):
        train(average, optimizer, 1)
    train(average, optimizer)  # without a warning, which would fail the test
    assert error(average) <= 2e-6  # float32 bound
    average.update_parameters(other)
    retract_adapters(average)
    train(average, RiemannianAdamW(average.parameters(), lr=0.05, weight_decay=0.0), 1)  # without one either


def test_points_that_something_moves_between_steps_are_named() -> None:
    """Clipped weights: the step brings them back, but the loss is computed where they were clipped."""
    net = network()
    optimizer = RiemannianAdamW(net.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(9):
        train(net, optimizer, 1)
        with torch.no_grad():
            for p in net.parameters():
                p.clamp_(-0.3, 0.3)
    assert error(net) > 1e-3
    with pytest.warns(UserWarning, match="left their manifold .* let nothing else write to them"):
        train(net, optimizer, 1)
    assert error(net) <= 2e-6  # float32 bound, so that a measurement after the step finds nothing
