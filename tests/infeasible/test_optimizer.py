"""Torch optimizers whose points step without a retraction."""

import copy
import io
import pickle

import geoopt
import pytest
import torch
from torch import Tensor, nn

from manifold_cl import EBLoRALinear, RestrictedStiefel, inject_adapters, param_groups
from manifold_cl.infeasible import INFEASIBLE_STEPS, infeasible
from manifold_cl.optim import RiemannianSGD, riemannian

names = pytest.mark.parametrize("name", sorted(INFEASIBLE_STEPS))


def problem(*, n: int = 40, p: int = 5, k: int = 7, dtype=torch.float64, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    manifold = RestrictedStiefel(torch.randn(n, k, dtype=torch.float64, generator=draw))
    point = geoopt.ManifoldParameter(manifold.random(n, p, dtype=dtype, generator=draw).as_subclass(Tensor), manifold)
    return manifold, point, torch.randn(n, p, dtype=dtype, generator=draw)


def train(point: Tensor, target: Tensor, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (point - target).square().sum()).backward()
        optimizer.step()


@names
@pytest.mark.parametrize(("base", "options"), [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}), (torch.optim.Adam, {})])
def test_procrustes_converges_and_the_end_is_on_the_manifold(name, base, options):
    manifold, point, target = problem(dtype=torch.float32)
    optimizer = infeasible(base, step=name)([point], **{"lr": 0.02, **options})
    train(point, target, optimizer, 1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 200)
    for _ in range(40):
        for _ in range(5):
            train(point, target, optimizer, 1)
            schedule.step()
        assert optimizer.constraint_error().protection <= 2e-6
    before = optimizer.return_to_manifold()
    assert before.orthonormality < 0.02
    assert max(optimizer.constraint_error()) <= 2e-6
    best = manifold.projx(target.double())
    torch.testing.assert_close(point.detach().as_subclass(Tensor).double(), best, rtol=0, atol=3e-3)


@names
def test_a_step_is_what_its_formula_says_with_the_projection_on_the_sum(name):
    manifold, point, target = problem()
    x = point.detach().as_subclass(Tensor).clone()
    optimizer = infeasible(torch.optim.SGD, step=name)([point], lr=0.1)
    train(point, target, optimizer, 1)
    g = manifold._project_out(x - target)
    expected = manifold._project_out(INFEASIBLE_STEPS[name](x, -0.1 * g, lr=0.1))
    torch.testing.assert_close(point.detach().as_subclass(Tensor), expected, rtol=0, atol=1e-14)
    assert float((expected - x).norm()) > 0.1


@names
def test_one_step_removes_a_leak_into_the_protected_directions(name):
    manifold, point, target = problem()
    point.data.add_(1e-3 * manifold.complement @ torch.ones(7, 5, dtype=torch.float64))
    optimizer = infeasible(torch.optim.SGD, step=name)([point], lr=0.1)
    assert optimizer.constraint_error().protection > 1e-4
    train(point, target, optimizer, 1)
    assert optimizer.constraint_error().protection < 1e-15


def test_the_displacement_of_an_element_wise_optimizer_is_projected_before_the_step():
    manifold, point, target = problem()
    x = point.detach().as_subclass(Tensor).clone()
    train(point, target, infeasible(torch.optim.Adam, step="pogo")([point], lr=0.01, eps=0.0), 1)
    d = manifold._project_out(-0.01 * manifold.proju(x, x - target).sign())  # Adam's first step
    assert float(d.norm()) < 0.98 * 0.01 * 200**0.5  # the signs reach into F
    expected = INFEASIBLE_STEPS["pogo"](x, d, lr=0.01)
    torch.testing.assert_close(point.detach().as_subclass(Tensor), expected, rtol=0, atol=1e-12)


def test_points_of_one_shape_step_together_as_they_do_alone():
    problems = [problem(seed=i, k=7 if i < 3 else 0) for i in range(5)]
    alone = copy.deepcopy(problems)
    together = infeasible(torch.optim.Adam)([point for _, point, _ in problems], lr=0.05)
    for _ in range(5):
        together.zero_grad()
        sum((point - target).square().sum() for _, point, target in problems).backward()
        together.step()
    for (_, point, target), (_, reference, _) in zip(problems, alone, strict=True):
        optimizer = infeasible(torch.optim.Adam)([reference], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (reference - target).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(point, reference, rtol=0, atol=1e-13)


def test_adapters_and_other_parameters_train_in_one_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    complement = torch.linalg.qr(torch.randn(16, 4))[0]
    inject_adapters(model, ["0"], lambda name, layer: EBLoRALinear(layer, 3, complement=complement))
    model[2].weight.requires_grad_(True)
    optimizer = infeasible(torch.optim.AdamW)(param_groups(model, lr=1e-2, weight_decay=0.1))
    x, losses = torch.randn(64, 16), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].tanh()).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert len(optimizer.held_parameters()) == 2
    assert optimizer.constraint_error().protection <= 2e-6
    assert optimizer.constraint_error().orthonormality <= 1e-4


def test_a_state_resumes_to_the_same_bits_and_survives_pickle_and_copy():
    def fresh():
        _, point, target = problem()
        return point, target, infeasible(torch.optim.Adam, step="landing")([point], lr=0.05)

    point, target, optimizer = fresh()
    train(point, target, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, _, resumed = fresh()
    again.data.copy_(point)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    twin, other = copy.deepcopy((point, optimizer)), pickle.loads(pickle.dumps((point, optimizer)))
    for p, o in ((point, optimizer), (again, resumed), twin, other):
        train(p, target, o, 5)
    for p in (again, twin[0], other[0]):
        assert torch.equal(p.detach(), point.detach())
    assert type(other[1]) is type(optimizer)


class Counting(torch.optim.SGD):
    """Keeps plain attributes beside its groups, as many optimizers of others do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.limits, self.steps = [0.5], 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def test_attributes_of_the_base_survive_pickle_and_copy():
    _, point, target = problem()
    optimizer = infeasible(Counting)([point])
    train(point, target, optimizer, 2)
    done = optimizer.steps
    for p, o in (copy.deepcopy((point, optimizer)), pickle.loads(pickle.dumps((point, optimizer)))):
        train(p, target, o, 1)
        assert (o.limits, o.steps) == ([0.5], done + 1)
        assert not torch.equal(p.detach(), point.detach())


def test_step_hooks_run_once_and_a_closure_has_gradients():
    _, point, target = problem()
    torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)  # torch now wraps the step of the class
    optimizer = infeasible(torch.optim.SGD)([point], lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        loss = (point - target).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert calls == [1]


def test_the_own_gradient_of_a_point_stays_as_it_was():
    _, point, target = problem()
    optimizer = infeasible(torch.optim.SGD)([point], lr=0.1)
    (0.5 * (point - target).square().sum()).backward()
    before, same = point.grad.clone(), point.grad
    optimizer.step()
    assert point.grad is same
    assert torch.equal(point.grad, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    _, point, target = problem()
    optimizer = infeasible(torch.optim.Adam)([point], lr=0.1)
    train(point, target, optimizer, 2)
    x, state = point.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    point.grad[0, 0] = value
    with pytest.raises(ValueError, match=r"1 of 1 points.*\(40, 5\)"):
        optimizer.step()
    assert torch.equal(point.detach(), x)
    assert float(state[0]["step"]) == float(optimizer.state_dict()["state"][0]["step"])
    assert torch.equal(state[0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_step_that_is_not_finite_moves_no_parameter():
    _, point, target = problem(dtype=torch.float32)
    plain = nn.Parameter(torch.ones(3))
    optimizer = infeasible(torch.optim.SGD, step="pogo")([point, plain], lr=1e20)
    x = point.detach().clone()
    ((point - target).square().sum() + plain.sum()).backward()
    with pytest.raises(ValueError, match=r"'pogo'.*\(40, 5\).*lower lr"):
        optimizer.step()
    assert torch.equal(point.detach(), x)
    assert torch.equal(plain.detach(), torch.ones(3))


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="Optimizer class"):
        infeasible(int)
    with pytest.raises(TypeError, match="RiemannianSGD keeps"):
        infeasible(RiemannianSGD)
    with pytest.raises(TypeError, match="geoopt's"):
        infeasible(geoopt.optim.RiemannianAdam)
    for kind, reason in ((infeasible(torch.optim.SGD), "already"), (geoopt.optim.RiemannianSGD, "use it as it is")):
        with pytest.raises(TypeError, match=f"{kind.__name__} cannot be made Riemannian: .*{reason}"):
            riemannian(kind)
    with pytest.raises(TypeError, match="LBFGS"):
        infeasible(torch.optim.LBFGS)
    sphere = geoopt.ManifoldParameter(torch.eye(4)[0], geoopt.Sphere())
    with pytest.raises(TypeError, match="RestrictedStiefel, got Sphere"):
        infeasible(torch.optim.SGD)([sphere], lr=0.1)
    half = nn.Parameter(torch.eye(6, 2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="bfloat16"):
        infeasible(torch.optim.SGD)([{"params": [half], "manifolds": [RestrictedStiefel()]}], lr=0.1)
