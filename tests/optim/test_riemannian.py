"""The Riemannian step as a torch optimizer: constraints, hooks, closures, schedules, copies."""

import copy
import io
import pickle
import warnings

import geoopt
import pytest
import torch
from problems import Net, train
from torch import nn

from manifold_cl import (
    EBLoRALinear,
    ProtectedSubspace,
    RestrictedStiefel,
    RiemannianAdamW,
    RiemannianSGD,
    param_groups,
    riemannian,
)

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 3e-3}),
    "Adam": (torch.optim.Adam, {"lr": 3e-3, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    "NAdam": (torch.optim.NAdam, {"lr": 3e-3}),
    "RAdam": (torch.optim.RAdam, {"lr": 3e-3}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_torch_optimizer_descends_and_holds_the_constraint(name):
    base, options = OPTIMIZERS[name]
    net = Net()
    optimizer = riemannian(base)(param_groups(net, lr=options["lr"]), **options)
    start = float(net.loss().detach())
    train(net, optimizer, 150)
    assert float(net.loss().detach()) < 0.8 * start
    assert net.worst() <= 2e-6  # float32 bound


@pytest.mark.parametrize("steps", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_the_constraint_holds_after_many_steps_in_float32(steps):
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, steps)
    assert net.worst() <= 2e-6


def test_resume_is_bit_exact_and_the_state_is_plain():
    net, straight = Net(), Net()
    through = RiemannianAdamW(param_groups(straight, lr=3e-3, scale_lr=1e-2))
    train(straight, through, 20)

    first = RiemannianAdamW(param_groups(net, lr=3e-3, scale_lr=1e-2))
    train(net, first, 10)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # fails on anything but tensors and plain values
    later = Net(seed=5)
    later.load_state_dict(saved["model"])
    later.x, later.y = net.x, net.y
    second = RiemannianAdamW(param_groups(later, lr=1.0))
    second.load_state_dict(saved["optimizer"])
    train(later, second, 10)
    for a, b in zip(straight.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_and_state_hold_no_basis_and_no_module():
    optimizer = RiemannianAdamW(param_groups(Net(), lr=1e-3))
    for group in optimizer.param_groups:
        for key, value in group.items():
            assert key == "params" or isinstance(value, int | float | str | bool | tuple | type(None)), key
    assert {group["role"] for group in optimizer.param_groups} == {"points", "scales", "decay", "no_decay"}


def test_batching_by_shape_equals_stepping_one_by_one():
    batched = [Net(seed=s, k=(3 + s, 5 + s)) for s in range(3)]
    single = [Net(seed=s, k=(3 + s, 5 + s)) for s in range(3)]
    together = RiemannianAdamW(param_groups(nn.ModuleList(batched), lr=3e-3))
    apart = [RiemannianAdamW(param_groups(net, lr=3e-3)) for net in single]
    for _ in range(10):
        together.zero_grad()
        sum(net.loss() for net in batched).backward()
        together.step()
        for net, optimizer in zip(single, apart, strict=True):
            train(net, optimizer, 1)
    for a, b in zip(batched, single, strict=True):
        # float32; batched products sum in another order
        torch.testing.assert_close(a.first.right, b.first.right, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adafactor"])  # decoupled, in the gradient, in a momentum
def test_weight_decay_is_not_applied_to_points_and_that_is_said_once(name):
    cls, options = OPTIMIZERS[name]
    nets = [Net(), Net()]
    groups = param_groups(nets[1], lr=options["lr"])
    groups[0]["weight_decay"] = 0.5
    with pytest.warns(UserWarning, match="no direction on the manifold: points are stepped without it") as caught:
        decayed = riemannian(cls)(groups, **options)
    assert len(caught) == 1
    assert decayed.param_groups[0]["weight_decay"] == 0.5  # the group is the user's
    plain = riemannian(cls)(param_groups(nets[0], lr=options["lr"]), **options)
    for net, optimizer in zip(nets, (plain, decayed), strict=True):
        train(net, optimizer, 10)
    assert torch.equal(nets[0].first.left, nets[1].first.left)


def test_the_default_decay_of_adamw_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RiemannianAdamW(param_groups(Net(), lr=1e-3))


def test_plain_parameters_step_exactly_as_without_us():
    weights = [torch.full((4, 3), 0.5, requires_grad=True) for _ in range(2)]
    ours, theirs = RiemannianAdamW([weights[0]], lr=1e-2), torch.optim.AdamW([weights[1]], lr=1e-2)
    for _ in range(5):
        for w, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (w**3).sum().backward()
            optimizer.step()
    assert torch.equal(*weights)


def test_gradients_are_left_as_they_were():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-3))
    net.loss().backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, p in net.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, before[name]), name


def test_hooks_run_once_though_the_parent_class_was_used_before():
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # patches AdamW.step with torch's hook wrapper
    net, calls = Net(), []
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-3))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(net, optimizer, 3)
    assert calls == ["pre", "post"] * 3


def test_closures_are_evaluated_once_with_gradients():
    net, calls = Net(), []
    optimizer = RiemannianSGD(param_groups(net, lr=1e-2))

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net.loss()
        loss.backward()
        return loss

    with torch.no_grad():
        first = float(optimizer.step(closure))
    assert calls == [True]
    assert float(net.loss().detach()) < first


def test_parameters_without_a_gradient_stay_where_they_are():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    net.loss().backward()
    net.first.right.grad = None
    before = net.first.right.detach().clone()
    optimizer.step()
    assert torch.equal(net.first.right, before)
    assert net.worst() <= 2e-6


def test_schedulers_move_the_rate_that_the_step_uses():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = net.first.left.detach().clone()
    net.loss().backward()
    optimizer.step()
    schedule.step()
    # lr = 0: no displacement; retracting a point to itself may round.
    torch.testing.assert_close(net.first.left.detach(), before, rtol=0, atol=3e-7)


def test_a_skipped_scaler_step_changes_nothing():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(net.state_dict())
    scaler.scale(net.loss()).backward()
    net.first.left.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    optimizer.zero_grad()
    scaler.scale(net.loss()).backward()
    scaler.step(optimizer)
    assert not torch.equal(net.first.left, before["first.left"])
    assert net.worst() <= 2e-6


def test_copies_and_pickles_still_know_their_manifolds():
    draw = torch.Generator().manual_seed(0)
    manifold = RestrictedStiefel(torch.randn(20, 6, generator=draw))
    point = geoopt.ManifoldParameter(manifold.random(20, 3, generator=draw), manifold=manifold)
    optimizer = RiemannianAdamW([point], lr=1e-2)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (p,) = twin.param_groups[0]["params"]
        p.grad = torch.randn(20, 3, generator=draw)
        twin.step()
        assert max(twin.manifold_of(p).constraint_error(p)) <= 2e-6
        assert float((p.detach() - point.detach()).norm()) > 1e-3


def test_a_batch_of_points_in_one_parameter_is_stepped_as_a_batch():
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 12, 4, generator=draw))[0]
    manifold = RestrictedStiefel(basis)
    points = geoopt.ManifoldParameter(manifold.random(3, 12, 2, generator=draw), manifold=manifold)
    optimizer = RiemannianSGD([points], lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        (points * torch.arange(12.0)[:, None]).sum().backward()
        optimizer.step()
    assert max(manifold.constraint_error(points)) <= 2e-6


def test_a_complement_that_changes_is_noticed():
    draw = torch.Generator().manual_seed(0)
    manifold = RestrictedStiefel(torch.linalg.qr(torch.randn(16, 4, generator=draw))[0])
    point = geoopt.ManifoldParameter(manifold.random(16, 2, generator=draw), manifold=manifold)
    optimizer = RiemannianSGD([point], lr=0.1)
    point.grad = torch.randn(16, 2, generator=draw)
    optimizer.step()
    manifold.complement.copy_(torch.linalg.qr(torch.randn(16, 4, generator=draw))[0])
    with torch.no_grad():
        point.copy_(manifold.projx(point))
    optimizer.step()
    assert max(manifold.constraint_error(point)) <= 2e-6


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: riemannian(torch.optim.LBFGS), TypeError, "evaluates the loss several times"),
        (lambda: riemannian(nn.Linear), TypeError, "takes a torch.optim.Optimizer class"),
        (
            lambda: RiemannianAdamW(param_groups(Net(), lr=1e-3), metric_pre="canonic"),
            ValueError,
            "metric_pre is one of",
        ),
        (lambda: RiemannianAdamW(param_groups(Net(), lr=1e-3), differentiable=True), ValueError, "differentiable"),
        (lambda: param_groups(nn.Linear(2, 2).requires_grad_(False), lr=1e-3), ValueError, "no trainable parameters"),
        (
            lambda: RiemannianAdamW([{"params": [nn.Parameter(torch.eye(3))], "manifold": "RestrictedStiefel"}]),
            ValueError,
            "is missing: build the groups",
        ),
        (
            lambda: RiemannianAdamW(
                [{"params": [nn.Parameter(torch.ones(6))], "manifolds": [RestrictedStiefel()]}],
            ),
            ValueError,
            "FSDP1, DeepSpeed ZeRO",
        ),
        (
            lambda: RiemannianAdamW(
                [{"params": [nn.Parameter(torch.eye(3).bfloat16())], "manifolds": [RestrictedStiefel()]}],
            ),
            TypeError,
            "got torch.bfloat16",
        ),
        (
            lambda: RiemannianAdamW([{"params": [nn.Parameter(torch.eye(3))], "manifolds": []}]),
            ValueError,
            "they run parallel",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_the_metric_of_a_manifold_reaches_the_step():
    ends = {}
    for metric in ("euclidean", "canonical"):
        draw = torch.Generator().manual_seed(0)
        manifold = RestrictedStiefel(torch.randn(12, 3, generator=draw), metric=metric, retraction="polar")
        point = geoopt.ManifoldParameter(manifold.random(12, 4, generator=draw), manifold=manifold)
        optimizer = RiemannianSGD([point], lr=0.1)
        point.grad = torch.randn(12, 4, generator=draw)
        start = point.detach().clone().as_subclass(torch.Tensor)
        expected = manifold.retr(start, -0.1 * manifold.egrad2rgrad(start, point.grad))
        optimizer.step()
        ends[metric] = point.detach().clone().as_subclass(torch.Tensor)
        torch.testing.assert_close(ends[metric], expected, rtol=0, atol=5e-7)  # float32, batched sums
    # The canonical gradient doubles the rotation, so the two steps differ by far more than rounding.
    assert float((ends["euclidean"] - ends["canonical"]).abs().max()) > 1e-3


def test_a_step_of_any_length_ends_on_the_manifold():
    manifold = RestrictedStiefel(torch.randn(64, 9, generator=torch.Generator().manual_seed(0)))
    for length in (1.0, 30.0, 300.0):
        point = geoopt.ManifoldParameter(manifold.random(64, 5, generator=torch.Generator().manual_seed(1)), manifold)
        direction = torch.zeros(64, 5)
        direction[:, 0] = torch.randn(64, generator=torch.Generator().manual_seed(2))  # one large singular value
        point.grad = length * direction / direction.norm()
        RiemannianSGD([point], lr=1.0).step()
        assert max(manifold.constraint_error(point)) <= 2e-6  # float32 bound


def test_a_subspace_made_in_inference_mode_can_be_protected():
    with torch.inference_mode():
        basis = torch.linalg.qr(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))[0]
    net = Net()
    net.first = EBLoRALinear(net.first.base, 4, complement=ProtectedSubspace(basis))
    train(net, RiemannianAdamW(param_groups(net, lr=1e-2)), 2)
    assert net.worst() <= 2e-6
