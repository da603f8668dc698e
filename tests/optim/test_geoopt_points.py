"""Points on geoopt's own manifolds step too, and are found as points."""

import copy
import pickle

import geoopt
import pytest
import torch
from problems import Net

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD, param_groups
from manifold_cl.infeasible import infeasible


def test_any_geoopt_manifold_steps_by_its_own_retraction():
    draw = torch.Generator().manual_seed(0)
    sphere = geoopt.Sphere()
    point = geoopt.ManifoldParameter(sphere.projx(torch.randn(5, 7, generator=draw)), manifold=sphere)
    ball = geoopt.ManifoldParameter(torch.full((4,), 0.1), manifold=geoopt.PoincareBall())
    optimizer = RiemannianAdamW([point, ball], lr=0.1)
    goal = sphere.projx(torch.randn(5, 7, generator=draw))
    for _ in range(100):
        optimizer.zero_grad()
        (-(point * goal).sum() + ((ball - 0.3) ** 2).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(point.detach().as_subclass(torch.Tensor), goal, rtol=0, atol=5e-2)  # Adam hovers by lr
    assert float(ball.detach().norm()) < 1
    assert float((point.detach().norm(dim=-1) - 1).abs().max()) < 1e-6


def test_points_of_geoopt_are_points_of_param_groups():
    net = Net()
    net.extra = geoopt.ManifoldParameter(torch.eye(8)[:, :2], RestrictedStiefel())
    net.sphere = geoopt.ManifoldParameter(torch.eye(4)[0], geoopt.Sphere())
    net.plain = geoopt.ManifoldParameter(torch.zeros(3, 3), geoopt.Euclidean())
    groups = param_groups(net, lr=1e-2, weight_decay=0.1)
    assert [(group["role"], group["manifold"]) for group in groups] == [
        ("points", RestrictedStiefel.name),
        ("points", "Sphere"),
        ("scales", "euclidean"),
        ("decay", "euclidean"),
        ("no_decay", "euclidean"),
    ]
    assert net.extra is groups[0]["params"][-1]
    assert any(p is net.plain for p in groups[3]["params"])
    optimizer = RiemannianAdamW(groups, lr=1e-2)
    assert optimizer.manifold_of(net.sphere) is net.sphere.manifold


def test_a_vector_is_scaled_by_its_own_length():
    sphere = geoopt.Sphere()
    points = [geoopt.ManifoldParameter(torch.eye(100)[0], sphere) for _ in range(2)]
    for p, scale in zip(points, ("none", "width"), strict=True):
        p.grad = torch.eye(100)[1]
        RiemannianSGD([p], lr=0.1, step_scale=scale, reference_width=100).step()
    assert torch.equal(*points)  # sqrt(100 / 100)


@pytest.mark.parametrize("make", [RiemannianAdamW, infeasible(torch.optim.SGD)])
@pytest.mark.parametrize("again", [lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_manifold_that_replaces_that_of_a_point_counts_from_the_next_step(make, again, generator):
    """The next task protects more: the optimizer protected what the first one did."""
    basis = torch.linalg.qr(torch.randn(12, 5, generator=generator))[0]
    first, later = RestrictedStiefel(basis[:, :2]), RestrictedStiefel(basis)
    points = [geoopt.ManifoldParameter(first.random(12, 3, generator=generator), manifold=first) for _ in range(2)]
    points, optimizer = again((points, make(points, lr=0.05, weight_decay=0.0)))
    for step in range(4):
        for p in points:
            p.grad = torch.randn(12, 3, generator=generator)
        optimizer.step()
        points[0].manifold = later
        leaks = [float((basis.mT @ p.detach().as_subclass(torch.Tensor)).abs().max()) for p in points]
        assert (leaks[0] <= 2e-6) == (step > 0)  # float32 bound
        assert leaks[1] > 1e-2
    assert optimizer.manifold_of(points[0]) is later


def test_a_manifold_that_the_group_gives_is_not_that_of_the_point(generator):
    own, given = RestrictedStiefel(), RestrictedStiefel(torch.eye(12)[:, :2])
    point = geoopt.ManifoldParameter(given.random(12, 3, generator=generator).as_subclass(torch.Tensor), manifold=own)
    optimizer = RiemannianSGD([{"params": [point], "manifolds": [given]}], lr=0.1)
    point.manifold, point.grad = RestrictedStiefel(), torch.randn(12, 3, generator=generator)
    optimizer.step()
    assert optimizer.manifold_of(point) is given


class Halved(RestrictedStiefel):
    """Replaces two verbs: it steps half as far, and its gradients are twice as long."""

    def retr(self, x, u):
        return super().retr(x, u / 2)

    def egrad2rgrad(self, x, u):
        return 2 * super().egrad2rgrad(x, u)


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_the_verbs_of_a_subclass_are_those_that_the_optimizer_takes(retraction, generator):
    """Its points were stacked with others, on a manifold of the parent class."""
    manifold = Halved(torch.randn(12, 2, generator=generator), retraction=retraction)
    points = [geoopt.ManifoldParameter(manifold.random(12, 3, generator=generator), manifold=manifold) for _ in "ab"]
    optimizer, expected = RiemannianSGD(points, lr=0.1, metric_pre="euclidean"), []
    for p in points:
        p.grad = torch.randn(12, 3, generator=generator)
        x = p.detach().as_subclass(torch.Tensor).clone()
        expected.append(manifold.retr(x, -0.1 * manifold.egrad2rgrad(x, p.grad)))
    gradients = torch.stack([manifold.egrad2rgrad(p.detach(), p.grad) for p in points])
    assert float(optimizer.riemannian_grad_norm()) == pytest.approx(float(gradients.norm()))
    optimizer.step()
    for p, y in zip(points, expected, strict=True):
        torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), y, rtol=0, atol=1e-6)  # float32
