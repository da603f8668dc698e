"""Averages of gradients that move along with the points, and Adam with one second moment a matrix."""

import geoopt
import pytest
import torch

from manifold_cl import RestrictedStiefel, RiemannianAdamW, riemannian
from manifold_cl.optim import RiemannianAdam


def point_on(manifold, draw, n=16, p=3):
    return geoopt.ManifoldParameter(manifold.random(n, p, generator=draw).detach(), manifold=manifold)


def train(point, optimizer, target, steps=20):
    for _ in range(steps):
        optimizer.zero_grad()
        ((point - target) ** 2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("metric_pre", ["none", "euclidean"])
@pytest.mark.parametrize(
    ("base", "options", "name"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.0}, "exp_avg"),
        (torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer"),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}, "momentum_buffer"),
    ],
)
def test_transported_averages_are_tangent_at_the_new_point_and_ambient_ones_are_not(
    base, options, name, metric_pre, generator
):
    target = torch.randn(16, 3, dtype=torch.float64, generator=generator)
    manifold = RestrictedStiefel(torch.randn(16, 5, dtype=torch.float64, generator=generator))
    leaks = {}
    for moments in ("ambient", "transport"):
        point = point_on(manifold, generator)
        optimizer = riemannian(base)([point], lr=1e-2, moments=moments, metric_pre=metric_pre, **options)
        train(point, optimizer, target)
        average = optimizer.state[point][name]
        leaks[moments] = float((average - manifold.proju(point.detach(), average)).abs().max())
    assert leaks["transport"] < 1e-14  # float64 rounding
    assert leaks["ambient"] > 1e-4


def test_any_manifold_of_geoopt_carries_averages_by_its_own_transport(generator):
    sphere = geoopt.Sphere()
    point = geoopt.ManifoldParameter(sphere.projx(torch.randn(7, dtype=torch.float64, generator=generator)), sphere)
    optimizer = RiemannianAdam([point], lr=1e-2)
    train(point, optimizer, torch.randn(7, dtype=torch.float64, generator=generator))
    inner = float((optimizer.state[point]["exp_avg"] * point.detach()).sum())
    assert abs(inner) < 1e-15  # tangent to the sphere, to float64 rounding


def momentum(key):
    """An optimizer that steps parameter by parameter, so that we cannot know that it is element-wise.

    Its average of gradients has the name ``key``.
    """

    class Momentum(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        buffer = self.state[p].setdefault(key, torch.zeros_like(p))
                        buffer.lerp_(p.grad, 0.1)
                        p.sub_(buffer, alpha=group["lr"])

    return Momentum


def test_an_optimizer_outside_torch_carries_its_averages_too(generator):
    manifold = RestrictedStiefel(torch.randn(16, 5, dtype=torch.float64, generator=generator))
    point = point_on(manifold, generator)
    optimizer = riemannian(momentum("exp_avg"))([point], lr=1e-2, moments="transport")
    train(point, optimizer, torch.randn(16, 3, dtype=torch.float64, generator=generator))
    average = optimizer.state[point]["exp_avg"]
    assert float((average - manifold.proju(point.detach(), average)).abs().max()) < 1e-14  # float64 rounding
    assert max(optimizer.constraint_error()) < 1e-14  # the same


def test_euclidean_parameters_of_the_matrix_adam_step_as_in_adam():
    weights = [torch.full((4, 3), 0.5, requires_grad=True) for _ in range(2)]
    goal = torch.arange(12.0).view(4, 3)
    pair = (RiemannianAdam([weights[0]], lr=1e-2), torch.optim.Adam([weights[1]], lr=1e-2))
    for _ in range(5):
        for w, optimizer in zip(weights, pair, strict=True):
            optimizer.zero_grad()
            ((w - goal) ** 2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)  # two orders of the same float32 operations


def test_the_second_moment_is_one_number_for_each_matrix(generator):
    manifold = RestrictedStiefel()
    points = [point_on(manifold, generator) for _ in range(3)]
    optimizer = RiemannianAdam(points, lr=1e-2)
    sum((p**3).sum() * (i + 1) for i, p in enumerate(points)).backward()
    optimizer.step()
    numbers = [optimizer.state[p]["exp_avg_sq"] for p in points]
    assert [tuple(v.shape) for v in numbers] == [(1, 1)] * 3
    assert len({float(v) for v in numbers}) == 3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: riemannian(torch.optim.Adagrad)([p], moments="transport"), "nothing to carry in Adagrad"),
        (lambda p: RiemannianAdamW([p], moments="parallel"), "moments is one of ambient, transport"),
        (lambda p: RiemannianAdam([p], second_moment="row"), "second_moment is one of matrix, element"),
        (lambda p: RiemannianAdam([p], lr=-1.0), "lr is at least 0"),
        (lambda p: RiemannianAdam([p], betas=(0.9, 1.0)), r"betas lie in \[0, 1\)"),
        (lambda p: RiemannianAdam([p], eps=-1.0), "eps is at least 0"),
    ],
)
def test_what_cannot_be_averaged_is_refused(make, match, generator):
    with pytest.raises(ValueError, match=match):
        make(point_on(RestrictedStiefel(), generator))


def test_a_base_without_an_average_that_can_be_carried_is_refused(generator):
    """The option was ignored in silence."""
    point = point_on(RestrictedStiefel(), generator)
    for base, reason in (
        (momentum("m"), "none of 'exp_avg', 'momentum_buffer'"),
        (torch.optim.ASGD, "averages no gradients"),
    ):
        with pytest.raises(ValueError, match=f"nothing to carry.*{reason}"):
            riemannian(base)([point], lr=1e-2, moments="transport")
        riemannian(base)([point], lr=1e-2)
