"""Transported moments equal their slow twin, and geoopt's Adam where the two are the same algorithm."""

import geoopt
import pytest
import torch
from slow_moments import SlowTransport

from manifold_cl import RestrictedStiefel, RiemannianAdamW
from manifold_cl.optim import RiemannianAdam


def frames(draw):
    """Points of two shapes with complements of different widths, one with none, and a target for each."""
    points = []
    for n, p, k in [(20, 4, 7), (20, 4, 3), (15, 4, 0), (9, 2, 2)]:
        basis = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=draw))[0]
        manifold = RestrictedStiefel(basis if k else None)
        point = manifold.random(n, p, dtype=torch.float64, generator=draw)
        target = torch.randn(n, p, dtype=torch.float64, generator=draw)
        points.append((geoopt.ManifoldParameter(point, manifold=manifold), target))
    return points


@pytest.mark.parametrize("matrix", [False, True], ids=["element", "matrix"])
def test_thirty_transported_steps_equal_the_slow_twin(matrix, generator):
    points = frames(generator)
    parameters = [p for p, _ in points]
    optimizer = (
        RiemannianAdam(parameters, lr=2e-2)
        if matrix
        else RiemannianAdamW(parameters, lr=2e-2, weight_decay=0.0, moments="transport")
    )
    twins = [SlowTransport(p.detach(), p.manifold.complement, lr=2e-2, matrix=matrix) for p, _ in points]
    for _ in range(30):
        optimizer.zero_grad()
        sum(((p - target) ** 3).sum() for p, target in points).backward()
        gradients = [p.grad.clone() for p in parameters]
        optimizer.step()
        for p, twin, gradient in zip(parameters, twins, gradients, strict=True):
            twin.step(gradient)
            # Two orders of summation in float64, amplified over 30 steps.
            torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), twin.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transport", ["projection", "isometric"])
def test_one_second_moment_for_each_matrix_is_the_adam_of_geoopt(transport, generator):
    n, p, lr = 12, 3, 0.3
    manifold = RestrictedStiefel(torch.randn(n, 2, dtype=torch.float64, generator=generator), transport=transport)
    start = manifold.random(n, p, generator=generator)
    target = torch.randn(n, p, dtype=torch.float64, generator=generator)
    ours, theirs = (geoopt.ManifoldParameter(start.detach().clone(), manifold=manifold) for _ in range(2))
    # geoopt sums squares where we average them: its rate is the length of the whole step.
    eps, entries = 1e-12, (n * p) ** 0.5
    optimizers = [
        RiemannianAdam([ours], lr=lr / entries, eps=eps / entries),
        geoopt.optim.RiemannianAdam([theirs], lr=lr, eps=eps),
    ]
    for _ in range(30):
        for point, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            ((point - target) ** 3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-11)  # float64 rounding over 30 steps


def test_the_matrix_step_does_not_depend_on_the_basis_of_a_frame_and_the_element_step_does(generator):
    n, p = 14, 4
    manifold = RestrictedStiefel(torch.randn(n, 3, dtype=torch.float64, generator=generator))
    start = manifold.random(n, p, generator=generator).as_subclass(torch.Tensor)
    turn = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64, generator=generator))[0]
    weight = torch.randn(n, n, dtype=torch.float64, generator=generator)
    gaps = {}
    for second_moment in ("matrix", "element"):
        ends = []
        for begin in (start, start @ turn):
            point = geoopt.ManifoldParameter(begin.clone(), manifold=manifold)
            optimizer = RiemannianAdam([point], lr=3e-2, second_moment=second_moment)
            for _ in range(20):
                optimizer.zero_grad()
                projector = point @ point.T  # a loss of what the frame spans
                ((projector - weight) ** 4).mean().backward()
                optimizer.step()
            ends.append(point.detach().as_subclass(torch.Tensor))
        gaps[second_moment] = float((ends[0] @ turn - ends[1]).abs().max())
    assert gaps["matrix"] < 1e-12  # float64 rounding over 20 steps
    assert gaps["element"] > 1e-2
