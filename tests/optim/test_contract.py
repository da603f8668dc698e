"""The contract of torch optimizers, and what trainers expect of one, held by the Riemannian ones."""

import copy
import importlib
import io
import math
import pickle
import sys
import warnings

import geoopt
import pytest
import torch
from problems import Net, train
from torch import nn

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD, param_groups, riemannian
from manifold_cl.optim import RiemannianAdam
from manifold_cl.optim.base_step import ELEMENTWISE, is_elementwise
from manifold_cl.optim.riemannian import RiemannianStep


def frames(net):
    return [p.detach().clone() for layer in (net.first, net.second) for _, p, _ in layer.manifold_parameters()]


def resumed(make, *, through=6, steps=6):
    """A run that is saved to bytes after ``through`` steps, loaded into a new model and optimizer, and finished."""
    net = Net()
    first = make(net)
    train(net, first, through)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    later = Net(seed=5)
    later.load_state_dict(saved["model"])
    later.x, later.y = net.x, net.y
    second = make(later)
    second.load_state_dict(saved["optimizer"])
    train(later, second, steps)
    return later


RESUMED = {
    "AdamW, transported, polished": lambda net: RiemannianAdamW(
        param_groups(net, lr=3e-3), moments="transport", polish_every=4
    ),
    "SGD": lambda net: RiemannianSGD(param_groups(net, lr=3e-3), momentum=0.9),
    "SGD without momentum": lambda net: RiemannianSGD(param_groups(net, lr=3e-3)),
    "Adagrad": lambda net: riemannian(torch.optim.Adagrad)(param_groups(net, lr=3e-3)),
    "NAdam": lambda net: riemannian(torch.optim.NAdam)(param_groups(net, lr=3e-3)),
    "Adafactor": lambda net: riemannian(torch.optim.Adafactor)(param_groups(net, lr=3e-3)),
    "matrix Adam": lambda net: RiemannianAdam(param_groups(net, lr=3e-3)),
}


@pytest.mark.parametrize("name", sorted(RESUMED))
def test_resume_is_bit_exact_for_every_kind_of_state(name):
    straight = Net()
    train(straight, RESUMED[name](straight), 12)
    for a, b in zip(straight.parameters(), resumed(RESUMED[name]).parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_into_a_running_optimizer_takes_effect_at_once():
    net = Net()
    optimizer = RiemannianSGD(param_groups(net, lr=1e-2), momentum=0.9)
    train(net, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    model = copy.deepcopy(net.state_dict())
    train(net, optimizer, 3)
    ends = frames(net)
    net.load_state_dict(model)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(ends, frames(net), strict=True))
    net.load_state_dict(model)
    fresh = RiemannianSGD(param_groups(Net(), lr=1e-2), momentum=0.9)
    optimizer.load_state_dict(fresh.state_dict())  # an empty state empties this one
    train(net, optimizer, 3)
    assert not torch.equal(ends[0], frames(net)[0])


def test_states_of_points_that_miss_steps_go_their_own_way():
    nets = [Net(), Net()]
    optimizers = [RiemannianAdamW(param_groups(net, lr=1e-2)) for net in nets]
    # The same gradients, once with both frames of a shape in one bucket, once in an optimizer each.
    lone = [RiemannianAdamW(groups, lr=1e-2) for groups in split(param_groups(nets[1], lr=1e-2))]
    del optimizers[1]
    for step in range(8):
        for net in nets:
            net.zero_grad()
            net.loss().backward()
            if step in (2, 3, 5):
                net.first.left.grad = None
        optimizers[0].step()
        for optimizer in lone:
            optimizer.step()
    assert float(optimizers[0].state[nets[0].first.left]["step"]) == 5
    assert float(optimizers[0].state[nets[0].second.right]["step"]) == 8
    for a, b in zip(frames(nets[0]), frames(nets[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # float32; batched products may sum in another order


def split(groups):
    """One list of groups for each parameter."""
    for group in groups:
        manifolds = group.get("manifolds", [None] * len(group["params"]))
        for p, manifold in zip(group["params"], manifolds, strict=True):
            yield [{**group, "params": [p], **({"manifolds": [manifold]} if manifold is not None else {})}]


def test_the_state_of_a_parameter_is_its_own_though_it_lies_in_a_bank():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, 2)
    for p in (net.first.left, net.second.right, net.head.weight):
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["step"].shape == ()


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("flag", ["foreach", "fused", "maximize"])
def test_flags_of_torch_are_honoured(base, flag):
    nets = [Net(), Net()]
    plain = riemannian(base)(param_groups(nets[0], lr=1e-2))
    flagged = riemannian(base)(param_groups(nets[1], lr=1e-2), **{flag: True})
    for net, optimizer in zip(nets, (plain, flagged), strict=True):
        for _ in range(5):
            optimizer.zero_grad()
            (-net.loss() if flag == "maximize" and optimizer is flagged else net.loss()).backward()
            optimizer.step()
    for a, b in zip(frames(nets[0]), frames(nets[1]), strict=True):
        # The same path: fused kernels round differently, and Adam's early steps amplify that to its rate of 1e-2.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert nets[1].worst() <= 2e-6


@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
def test_flags_that_cannot_be_honoured_are_refused_by_name(flag):
    with pytest.raises(ValueError, match=f"{flag}=True"):
        RiemannianAdamW(param_groups(Net(), lr=1e-3), **{flag: True})


def test_a_fused_optimizer_leaves_overflow_to_the_scaler():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(net.state_dict())
    scaler.scale(net.loss()).backward()
    net.first.left.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert scaler.get_scale() == 2.0


def test_a_rate_of_zero_leaves_every_point_where_it_is_to_the_bit():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = frames(net)
    train(net, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, frames(net), strict=True))


def test_the_rate_may_be_a_tensor_that_a_scheduler_moves():
    nets = [Net(), Net()]
    rates = [1e-2, torch.tensor(1e-2)]
    for net, lr in zip(nets, rates, strict=True):
        optimizer = RiemannianAdamW(param_groups(net, lr=lr))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)  # betas move too
        for _ in range(6):
            train(net, optimizer, 1)
            schedule.step()
    for a, b in zip(frames(nets[0]), frames(nets[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # the rate was float64 in one and float32 in the other


def test_accumulated_gradients_make_one_step():
    nets = [Net(), Net()]
    optimizers = [RiemannianAdamW(param_groups(net, lr=1e-2)) for net in nets]
    for _ in range(5):
        train(nets[0], optimizers[0], 1)
        optimizers[1].zero_grad()
        for half in (slice(0, 20), slice(20, 40)):
            x, y = nets[1].x[half], nets[1].y[half]
            out = nets[1].head(nets[1].second(torch.tanh(nets[1].first(x))))
            (((out - y) ** 2).mean() / 2).backward()
        optimizers[1].step()
    for a, b in zip(frames(nets[0]), frames(nets[1]), strict=True):
        # Two orders of summation; where a gradient is near zero Adam turns its sign into a step of 1e-2, rarely.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_groups_can_be_added_later_with_or_without_names(generator):
    first, later = Net(), Net(seed=1)
    optimizer = RiemannianAdamW(param_groups(first, lr=1e-2))
    train(first, optimizer, 2)
    for group in param_groups(later, lr=1e-2):
        optimizer.add_param_group(group)
    before = frames(later)
    optimizer.zero_grad()
    (first.loss() + later.loss()).backward()
    optimizer.step()
    assert not torch.equal(before[0], frames(later)[0])
    assert max(first.worst(), later.worst()) <= 2e-6
    manifold = RestrictedStiefel()
    point = nn.Parameter(manifold.random(6, 2, generator=generator).as_subclass(torch.Tensor))
    named = RiemannianAdamW([{"params": [("frame", point)], "manifolds": [manifold]}], weight_decay=0.0)
    assert named.param_groups[0]["param_names"] == ["frame"]
    assert named.manifold_of(point) is manifold


def test_polishing_brings_a_point_to_float64_accuracy_before_rounding():
    nets = [Net(), Net()]
    errors = []
    for net, every in zip(nets, (0, 1), strict=True):
        optimizer = RiemannianAdamW(param_groups(net, lr=1e-2), polish_every=every)
        train(net, optimizer, 30)
        errors.append(optimizer.constraint_error())
    assert max(errors[1]) < max(errors[0])
    assert max(errors[1]) < 1.2e-7  # entries are rounded to float32 once: a unit in the last place of 1
    assert optimizer.param_groups[0]["steps"] == 30


def test_the_constraint_error_is_reported_and_warned_of_once():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    assert max(optimizer.constraint_error()) <= 2e-6  # float32 bound
    with torch.no_grad():
        net.first.left += 1e-3
    with pytest.warns(UserWarning, match=r"left their manifold .* bring them back with p.copy_\(manifold.projx\(p\)\)"):
        error = optimizer.constraint_error()
    assert error.orthonormality > 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.constraint_error() == error


@pytest.mark.parametrize("due", [10, 100, 105])
def test_the_constraint_is_measured_early_and_then_from_time_to_time(monkeypatch, due):
    monkeypatch.setitem(vars(sys.modules[RiemannianStep.__module__]), "CHECK_EVERY", 35)
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=0.0))  # a step would repair the point
    train(net, optimizer, due - 1)
    with torch.no_grad():
        net.first.left += 1e-3
    with pytest.warns(UserWarning, match="left their manifold"):
        train(net, optimizer, 1)


def test_a_complement_written_through_data_is_found_when_the_constraint_is_measured():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, 2)
    complement = net.first.right_manifold.complement
    draw = torch.Generator().manual_seed(9)
    complement.data.copy_(torch.linalg.qr(torch.randn(complement.shape, generator=draw))[0])  # counts as no write
    with pytest.warns(UserWarning, match="left their manifold"):
        train(net, optimizer, 8)  # the tenth step measures
    train(net, optimizer, 1)
    assert max(optimizer.constraint_error()) <= 2e-6  # float32 bound, with the new complement


@pytest.mark.parametrize("layer", ["first", "second"])
def test_a_nan_point_is_never_the_smaller_error(layer):
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    with torch.no_grad():
        getattr(net, layer).left[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="left their manifold"):
        assert math.isnan(optimizer.constraint_error().orthonormality)


def test_a_compiled_step_gives_the_same_numbers_and_compiles_nothing_anew():
    from torch._dynamo.testing import CompileCounter

    nets = [Net(), Net()]
    optimizers = [RiemannianAdamW(param_groups(net, lr=1e-2)) for net in nets]
    counter = CompileCounter()
    compiled, counts = torch.compile(optimizers[1].step, backend=counter), []
    for step in range(5):
        for net, optimizer, advance in zip(nets, optimizers, (optimizers[0].step, compiled), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.zero_grad()
            net.loss().backward()
            advance()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]
    assert all(torch.equal(a, b) for a, b in zip(frames(nets[0]), frames(nets[1]), strict=True))


def test_a_class_made_on_the_fly_is_found_again_by_pickle(generator):
    manifold = RestrictedStiefel()
    point = geoopt.ManifoldParameter(manifold.random(8, 2, generator=generator).detach(), manifold=manifold)
    optimizer = riemannian(torch.optim.NAdam)([point], lr=1e-2)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert type(twin) is riemannian(torch.optim.NAdam)
    module = importlib.import_module("manifold_cl.optim.riemannian")  # manifold_cl.optim has a function of that name
    assert module.RiemannianNAdam is type(twin)
    with pytest.raises(AttributeError, match="RiemannianNothing"):
        module.RiemannianNothing  # noqa: B018


def test_a_state_saved_before_an_option_existed_is_completed():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for option in ("moments", "polish_every", "nonfinite"):
            del group[option]
    optimizer.load_state_dict(saved)
    train(net, optimizer, 1)
    assert optimizer.param_groups[0]["moments"] == "ambient"


def test_nothing_is_allocated_after_the_first_step_but_what_is_small():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, 2)
    plan = optimizer._riemannian.plan
    scratch, buckets = plan.workspace.nbytes, [id(bucket) for _, bucket in plan.buckets]
    train(net, optimizer, 5)
    assert plan.workspace.nbytes == scratch
    assert [id(bucket) for _, bucket in plan.buckets] == buckets


def test_only_torch_optimizers_known_to_be_elementwise_step_in_banks():
    class AdamW(torch.optim.AdamW):
        """Of somebody else, under a known name."""

    assert is_elementwise(torch.optim.AdamW)
    assert not is_elementwise(AdamW)
    assert not is_elementwise(torch.optim.Adafactor)


def test_every_elementwise_optimizer_gives_the_same_numbers_in_a_bank(monkeypatch):
    for name in ELEMENTWISE:
        base, ends = getattr(torch.optim, name), []
        for banked in (True, False):
            monkeypatch.setattr("manifold_cl.optim.base_step.ELEMENTWISE", ELEMENTWISE if banked else ())
            net = Net(k=(6, 6))
            train(net, riemannian(base)(param_groups(net, lr=1e-2)), 6)
            ends.append(frames(net))
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), name
        assert all(math.isfinite(float(a.sum())) for a in ends[0])


def test_states_with_0d_magnitudes_load():
    straight, resumed = Net(), Net()
    optimizer = RiemannianAdamW(param_groups(straight, lr=1e-2))
    train(straight, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    older = [index for index, state in saved["state"].items() if state["exp_avg"].shape == (1,)]
    for index in older:
        for key in ("exp_avg", "exp_avg_sq"):
            saved["state"][index][key] = saved["state"][index][key].reshape(())
    assert older
    resumed.load_state_dict(straight.state_dict())
    second = RiemannianAdamW(param_groups(resumed, lr=1e-2))
    second.load_state_dict(saved)
    train(straight, optimizer, 3)
    train(resumed, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
