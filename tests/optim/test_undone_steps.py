"""Steps that are not finite though gradients are: no parameter moves, on or off a manifold."""

import copy

import pytest
import torch
from problems import Plain, backward, problem

from manifold_cl import RiemannianAdamW, RiemannianSGD, riemannian


class WritesNaN(Plain):
    """Multiplies the last parameter of each group by NaN from its second step on."""

    def _step(self, group):
        super()._step(group)
        if self.count > 1:
            group["params"][-1].data.mul_(torch.nan)


def grouped(params):
    return [{"params": params[:3]}, {"params": params[3:]}]


def zero_over_zero(params):
    backward(params)
    params[1].grad.zero_()  # with eps=0 its step is 0/0


BASES = {
    "Adam": (torch.optim.Adam, {"eps": 0.0}, zero_over_zero),
    "RMSprop": (torch.optim.RMSprop, {"eps": 0.0}, zero_over_zero),
    "Adagrad": (torch.optim.Adagrad, {"eps": 0.0}, zero_over_zero),
    "WritesNaN": (WritesNaN, {}, backward),
}


@pytest.mark.parametrize("nonfinite", ["refuse", "skip"])
@pytest.mark.parametrize("name", BASES)
def test_a_step_that_is_not_finite_moves_no_parameter(name, nonfinite, generator):
    base, options, gradients = BASES[name]
    params = problem(generator)
    optimizer = riemannian(base)(grouped(params), lr=0.1, nonfinite=nonfinite, **options)
    backward(params)
    optimizer.step()
    if name != "WritesNaN":
        for key in ("exp_avg", "exp_avg_sq", "square_avg", "sum"):
            if key in optimizer.state[params[1]]:
                optimizer.state[params[1]][key].zero_()
    before = [p.detach().clone() for p in params]
    gradients(params)
    if nonfinite == "refuse":
        with pytest.raises(ValueError, match="no parameter has moved"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_a_rate_that_is_not_finite_is_refused_before_the_step(lr, place, generator):
    params = problem(generator)
    optimizer = RiemannianSGD(grouped(params), lr=0.1, momentum=0.9)
    optimizer.param_groups[place]["lr"] = lr
    backward(params)
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
def test_an_option_that_cannot_be_is_refused_when_it_is_set_later_or_loaded(option, generator):
    params = problem(generator)
    optimizer = RiemannianAdamW(grouped(params), weight_decay=0.0)
    backward(params)
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
def test_a_flag_that_a_subclass_sets_is_refused_by_name(flag, generator):
    class Flagged(torch.optim.Adam):
        def __init__(self, params, lr=0.01):
            super().__init__(params, lr=lr, **{flag: True})

    with pytest.raises(ValueError, match=flag):
        riemannian(Flagged)(problem(generator))


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_in_a_group_are_refused_as_in_the_constructor(flag, generator):
    params = problem(generator)
    with pytest.raises(ValueError, match=f"{flag}=True"):
        riemannian(torch.optim.Adam)([{"params": params, flag: True}])
    optimizer = riemannian(torch.optim.Adam)(params)
    optimizer.param_groups[0][flag] = True
    before = params[0].detach().clone()
    backward(params)
    with pytest.raises(ValueError, match=f"{flag}=True"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("base", [torch.optim.SGD, Plain])
@pytest.mark.parametrize("nonfinite", ["refuse", "skip"])
def test_a_step_that_would_not_be_finite_changes_nothing(base, nonfinite, generator):
    params = problem(generator)
    optimizer = riemannian(base)(params, lr=10.0, nonfinite=nonfinite)
    backward(params)
    params[0].grad.fill_(3e38)  # finite, and no product with it is
    before = [p.detach().clone() for p in params]
    if nonfinite == "refuse":
        with pytest.raises(ValueError, match=r"step of 1 of 3 points is not finite.*nothing was changed"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not optimizer.state
