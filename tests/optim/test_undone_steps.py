"""Steps that are not finite though gradients are: no parameter moves, on or off a manifold."""

import copy

import pytest
import torch
from torch import nn

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD, riemannian


class WritesNaN(torch.optim.Optimizer):
    """Gradient descent that multiplies the last parameter of each group by NaN from its second step on."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])
            if self.taken > 1:
                group["params"][-1].mul_(torch.nan)


def problem():
    """Points of two shapes, which step apart, and a Euclidean matrix and vector."""
    draw = torch.Generator().manual_seed(0)
    manifolds = [RestrictedStiefel(torch.linalg.qr(torch.randn(n, 3, generator=draw))[0]) for n in (20, 14, 20)]
    points = [
        nn.Parameter(m.random(m.complement.shape[0], 4, generator=draw).as_subclass(torch.Tensor)) for m in manifolds
    ]
    rest = [nn.Parameter(torch.randn(5, 2, generator=draw)), nn.Parameter(torch.randn(5, generator=draw))]
    groups = [{"params": points, "manifolds": manifolds}, {"params": rest}]
    return [*points, *rest], groups, draw


def fill_gradients(params, draw):
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw)


def zero_over_zero(params, draw):
    fill_gradients(params, draw)
    params[1].grad.zero_()  # with eps=0 its step is 0/0


BASES = {
    "Adam": (torch.optim.Adam, {"eps": 0.0}, zero_over_zero),
    "RMSprop": (torch.optim.RMSprop, {"eps": 0.0}, zero_over_zero),
    "Adagrad": (torch.optim.Adagrad, {"eps": 0.0}, zero_over_zero),
    "WritesNaN": (WritesNaN, {}, fill_gradients),
}


@pytest.mark.parametrize("nonfinite", ["refuse", "skip"])
@pytest.mark.parametrize("name", BASES)
def test_a_step_that_is_not_finite_moves_no_parameter(name, nonfinite):
    base, options, gradients = BASES[name]
    params, groups, draw = problem()
    optimizer = riemannian(base)(groups, lr=0.1, nonfinite=nonfinite, **options)
    fill_gradients(params, draw)
    optimizer.step()
    if name != "WritesNaN":
        for key in ("exp_avg", "exp_avg_sq", "square_avg", "sum"):
            if key in optimizer.state[params[1]]:
                optimizer.state[params[1]][key].zero_()
    before = [p.detach().clone() for p in params]
    gradients(params, draw)
    if nonfinite == "refuse":
        with pytest.raises(ValueError, match="no parameter has moved"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_a_rate_that_is_not_finite_is_refused_before_the_step(lr, place):
    params, groups, draw = problem()
    optimizer = RiemannianSGD(groups, lr=0.1, momentum=0.9)
    optimizer.param_groups[place]["lr"] = lr
    fill_gradients(params, draw)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))
    assert not optimizer.state


OPTIONS = {
    "metric_pre": "flat",
    "tangent_post": None,
    "step_scale": "height",
    "moments": "carry",
    "nonfinite": "ignore",
    "polish_every": -1,
    "reference_width": 0,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_cannot_be_is_refused_when_it_is_set_later_or_loaded(option):
    params, groups, draw = problem()
    optimizer = RiemannianAdamW(groups, weight_decay=0.0)
    fill_gradients(params, draw)
    optimizer.step()
    content = copy.deepcopy(optimizer.state_dict())
    content["param_groups"][0][option] = OPTIONS[option]
    with pytest.raises(ValueError, match=option):
        optimizer.load_state_dict(content)
    assert optimizer.param_groups[0][option] != OPTIONS[option]
    optimizer.param_groups[0][option] = OPTIONS[option]
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))


@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
def test_a_flag_that_a_subclass_sets_is_refused_by_name(flag):
    class Flagged(torch.optim.Adam):
        def __init__(self, params, lr=0.01):
            super().__init__(params, lr=lr, **{flag: True})

    with pytest.raises(ValueError, match=flag):
        riemannian(Flagged)(problem()[1])
