"""What does not fit is refused where it enters, by name, and nothing has changed then."""

import copy

import geoopt
import pytest
import torch
from problems import Net, train
from torch import nn

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD, TrainerOptimizer, param_groups, riemannian
from manifold_cl.optim import RiemannianAdam, clip_riemannian_grad_norm_
from manifold_cl.optim.riemannian import RiemannianStep


def snapshot(net, optimizer):
    return copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(value):
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, 2)
    before = snapshot(net, optimizer)
    net.loss().backward()
    net.second.right.grad[3, 1] = value
    with pytest.raises(ValueError, match=r"1 of 4 points have NaN .* \(24, 4\): nothing was changed"):
        optimizer.step()
    assert same(snapshot(net, optimizer), before)
    train(net, optimizer, 1)  # and life goes on
    assert net.worst() <= 2e-6


def test_a_gradient_that_is_not_finite_can_be_skipped_and_is_counted():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2), nonfinite="skip")
    train(net, optimizer, 2)
    before = snapshot(net, optimizer)
    net.loss().backward()
    net.second.right.grad[3, 1] = float("nan")
    optimizer.step()
    assert same(snapshot(net, optimizer), before)
    assert optimizer.skipped_steps == 1
    train(net, optimizer, 1)
    assert optimizer.skipped_steps == 1
    assert not same(snapshot(net, optimizer), before)


def test_a_huge_gradient_whose_sum_overflows_is_still_a_gradient():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    net.loss().backward()
    net.first.left.grad[:2] = 3e38
    before = net.first.left.detach().clone()
    optimizer.step()  # the element-wise square overflows: Adam does not move these entries
    assert net.first.left.isfinite().all()
    assert not torch.equal(net.first.right, before)


def test_sparse_gradients_are_refused():
    manifold = RestrictedStiefel()
    table = nn.Embedding(12, 3, sparse=True)
    with torch.no_grad():
        table.weight.copy_(manifold.projx(table.weight))
    optimizer = RiemannianAdamW([{"params": [table.weight], "manifolds": [manifold]}], weight_decay=0.0)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of layout torch.sparse_coo: .*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16, torch.int64])
def test_points_of_other_kinds_are_refused(dtype):
    p = torch.eye(3).to(dtype)
    with pytest.raises(TypeError, match=f"kept in float32 or float64, got {dtype}"):
        RiemannianAdamW([{"params": [p], "manifolds": [RestrictedStiefel()]}])


def test_a_point_that_became_half_precision_is_noticed_at_the_next_step():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    net.first.left.data = net.first.left.data.bfloat16()  # .to(bfloat16) leaves factors alone
    with pytest.raises(TypeError, match=r"got torch\.bfloat16"):
        optimizer.step()


def test_a_point_that_was_flattened_is_noticed_at_the_next_step():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    net.first.left.data = net.first.left.data.view(-1)
    with pytest.raises(ValueError, match="flattens parameters"):
        optimizer.step()


def test_parameters_of_zero_are_refused_by_their_mark():
    net = Net()
    net.first.left.ds_id = 0
    with pytest.raises(ValueError, match="holds pieces of several matrices"):
        param_groups(net, lr=1e-2)
    other = Net()
    optimizer = RiemannianAdamW(param_groups(other, lr=1e-2))
    other.first.left.ds_id = 0
    with pytest.raises(ValueError, match="holds pieces of several matrices"):
        optimizer.step()


def test_a_lost_manifold_is_an_error_and_not_a_euclidean_step():
    net = Net()
    groups = param_groups(net, lr=1e-2)
    del groups[0]["manifolds"]
    with pytest.raises(ValueError, match=r"manifold of a parameter of shape .* is missing"):
        RiemannianAdamW(groups, lr=1e-2)


def test_a_parameter_steps_once(generator):
    manifold = RestrictedStiefel()
    point = geoopt.ManifoldParameter(manifold.random(6, 2, generator=generator).detach(), manifold=manifold)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        RiemannianSGD([{"params": [point]}, {"params": [point]}], lr=1e-2)
    with pytest.raises(ValueError, match="listed twice in a group, at 0 and 1"):
        RiemannianSGD([point, point], lr=1e-2)


def other_state(change):
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    train(net, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return optimizer, saved


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s["param_groups"].pop(), "the state has 3 parameter groups, this optimizer 4"),
        (
            lambda s: s["param_groups"][1].update(role="points"),
            r"group 1 \(scales\): role is 'points' in the state and 'scales' here",
        ),
        (
            lambda s: s["param_groups"][0].update(manifold="Sphere"),
            r"group 0 \(points\): manifold is 'Sphere' in the state and 'RestrictedStiefel' here",
        ),
        (
            lambda s: s["param_groups"][0]["params"].pop(),
            r"group 0 \(points\): 3 parameters in the state and 4 here",
        ),
        (
            lambda s: s["state"][1].update(exp_avg=torch.zeros(32, 8)),
            r"group 0 \(points\), parameter 1: exp_avg has shape \(32, 8\) in the state, the parameter \(32, 4\) here",
        ),
    ],
)
def test_a_state_of_other_parameters_is_refused_naming_what_differs(change, match):
    optimizer, saved = other_state(change)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"polish_every": -1}, "polish_every is a number of steps, 0 for never, got -1"),
        ({"polish_every": 0.5}, "polish_every is a number of steps"),
        ({"reference_width": 0}, "reference_width is a positive width, got 0"),
        ({"nonfinite": "ignore"}, "nonfinite is one of refuse, skip"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        RiemannianAdamW(param_groups(Net(), lr=1e-3), **options)


def test_a_step_rule_sets_three_options_per_optimizer_or_per_group():
    groups = param_groups(Net(), lr=1e-3)
    groups[0] |= {"step_rule": "corrected", "step_scale": "width"}
    optimizer = RiemannianAdamW(groups, step_rule="official", reference_width=1024)
    names = ("metric_pre", "tangent_post", "step_scale", "reference_width")
    first, second = ([group[name] for name in names] for group in optimizer.param_groups[:2])
    assert first == ["euclidean", "orthogonal", "width", 1024]
    assert second == ["canonical", "double", "official", 1024]
    assert "step_rule" in groups[0]  # the caller's own
    trainer = TrainerOptimizer()(Net(), lr=1e-3, step_rule="official")
    assert trainer.param_groups[0]["tangent_post"] == "double"
    with pytest.raises(ValueError, match="step_rule is one of corrected, official, got 'released'"):
        RiemannianAdamW(groups[1:], step_rule="released")
    optimizer.param_groups[0]["step_rule"] = "official"
    with pytest.raises(ValueError, match="step_rule"):
        optimizer.step()


def test_the_rate_of_the_groups_is_the_rate_of_the_optimizer():
    class Descent(torch.optim.Optimizer):
        """Needs a rate in its constructor."""

        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=group["lr"])

    for make in (riemannian(Descent), RiemannianAdamW, RiemannianSGD, RiemannianAdam):
        optimizer = make(param_groups(Net(), lr=0.25, scale_lr=0.5))
        assert optimizer.defaults["lr"] == 0.25
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5, 0.25, 0.25]
    mixed = RiemannianSGD([{"params": [torch.zeros(2)], "lr": 0.25}, {"params": [torch.zeros(2)]}])
    assert [group["lr"] for group in mixed.param_groups] == [0.25, 1e-3]
    assert RiemannianSGD(param_groups(Net(), lr=0.25), lr=0.5).defaults["lr"] == 0.5


def test_the_released_step_belongs_to_restricted_stiefel(generator):
    sphere = geoopt.Sphere()
    point = geoopt.ManifoldParameter(sphere.projx(torch.randn(5, 7, generator=generator)), manifold=sphere)
    optimizer = RiemannianAdamW([point], weight_decay=0.0, metric_pre="canonical")
    point.sum().backward()
    with pytest.raises(ValueError, match="belong to RestrictedStiefel, got Sphere"):
        optimizer.step()


def test_clipping_measures_what_the_step_follows():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    net.loss().backward()
    squares = 0.0
    on = {p: manifold for layer in (net.first, net.second) for _, p, manifold in layer.manifold_parameters()}
    for p in net.parameters():
        if p.grad is not None:
            g = on[p].egrad2rgrad(p.detach(), p.grad) if p in on else p.grad
            squares += float(g.double().square().sum())
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    euclidean = float(torch.nn.utils.get_total_norm(before))
    total = clip_riemannian_grad_norm_(optimizer, 1e6)
    assert float(total) == pytest.approx(squares**0.5, rel=1e-5)  # float32 sums
    assert float(total) < 0.999 * euclidean
    after = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    clip_riemannian_grad_norm_(optimizer, 0.01)
    assert float(clip_riemannian_grad_norm_(optimizer, 1.0)) == pytest.approx(0.01, rel=1e-3)  # 1e-6 in the divisor


def test_clipping_knows_the_metric_of_the_manifold(generator):
    for metric in ("euclidean", "canonical"):
        manifold = RestrictedStiefel(torch.randn(9, 2, generator=generator), metric=metric, retraction="polar")
        point = geoopt.ManifoldParameter(manifold.random(9, 3, generator=generator).detach(), manifold=manifold)
        point.grad = torch.randn(9, 3, generator=generator)
        g = manifold.egrad2rgrad(point.detach(), point.grad)
        total = clip_riemannian_grad_norm_(RiemannianSGD([point], lr=1.0), 1e6)
        assert float(total) == pytest.approx(float(manifold.norm(point.detach(), g)), rel=1e-5)  # float32 sums


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda o: clip_riemannian_grad_norm_(torch.optim.SGD([torch.zeros(1)]), 1.0), TypeError, "got SGD"),
        (lambda o: clip_riemannian_grad_norm_(o, 0.0), ValueError, "max_norm is positive, got 0"),
        (
            lambda o: clip_riemannian_grad_norm_(o, 1.0, error_if_nonfinite=True),
            RuntimeError,
            "norm is nan: nothing was scaled",
        ),
    ],
)
def test_clipping_refuses_what_it_cannot_measure(call, error, match):
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    net.loss().backward()
    net.first.left.grad[0, 0] = float("nan")
    with pytest.raises(error, match=match):
        call(optimizer)


def test_every_riemannian_optimizer_is_a_riemannian_step():
    assert isinstance(RiemannianSGD([torch.zeros(1, requires_grad=True)], lr=1.0), RiemannianStep)


def test_a_group_that_is_refused_is_not_there():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    before = len(optimizer.param_groups)
    wrong = torch.zeros(9, 2, requires_grad=True)
    with pytest.raises(ValueError, match="points have 5 rows here"):
        optimizer.add_param_group({"params": [wrong], "manifolds": [RestrictedStiefel(torch.eye(5)[:, :1])]})
    assert len(optimizer.param_groups) == before
    assert optimizer.manifold_of(wrong) is None


def test_parameters_in_a_set_and_optimizers_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="an order that every run repeats, which a set does not have"):
        RiemannianAdamW([{"params": {torch.zeros(2, requires_grad=True)}}], lr=1e-2)
    with pytest.raises(TypeError, match="RiemannianAdamW is Riemannian already"):
        riemannian(RiemannianAdamW)

    class Ours(torch.optim.LBFGS):
        pass

    with pytest.raises(TypeError, match="Ours cannot be made Riemannian: it evaluates the loss several times"):
        riemannian(Ours)


def test_points_outside_the_groups_are_not_judged():
    net = Net()
    optimizer = RiemannianAdamW(param_groups(net, lr=1e-2))
    left_out = optimizer.param_groups[0]["params"].pop()
    net.loss().backward()
    left_out.grad.fill_(float("nan"))
    before = net.first.left.detach().clone()
    optimizer.step()
    assert not torch.equal(before, net.first.left)


def test_batches_with_and_without_a_basis_step_together():
    manifolds = [RestrictedStiefel(), RestrictedStiefel(torch.zeros(12, 0))]
    points = [geoopt.ManifoldParameter(torch.eye(12)[:, :2].repeat(3, 1, 1), manifold) for manifold in manifolds]
    optimizer = RiemannianAdamW(points, lr=1e-2)
    for p in points:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert max(optimizer.constraint_error()) <= 2e-6
