"""Points on geoopt's own manifolds step too, and are found as points."""

import geoopt
import torch
from problems import Net

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD, param_groups


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
