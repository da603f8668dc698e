"""Gradients that agree from step to step, and rates far above 1 / sqrt(n): both constraints hold at every step."""

import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel, riemannian

PROMISE = 2e-6
"""Largest entry of xᵀx − I and of Fᵀx in float32, after any number of steps."""


def restricted_pca(n, k, *, seed=1):
    """A complement and a matrix whose leading eigenvectors are sought outside it."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, k, generator=draw))[0]
    root = torch.randn(n, n, generator=draw)
    return basis, root @ root.T / n, draw


def worst_leak(n, p, k, steps, *, base="AdamW", retraction="polar", drift=0.0, **options):
    """The largest constraint errors of all steps of restricted PCA."""
    basis, matrix, draw = restricted_pca(n, k)
    manifold = RestrictedStiefel(basis, retraction=retraction)
    x = torch.nn.Parameter(manifold.random(n, p, generator=draw).as_subclass(torch.Tensor).clone())
    with torch.no_grad():
        x += drift * basis @ torch.randn(k, p, generator=draw)
    group = {"params": [x], "manifolds": [manifold], "weight_decay": 0.0}
    optimizer = riemannian(getattr(torch.optim, base))([group], **options)
    worst = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        (-(x.T @ matrix @ x).trace()).backward()
        optimizer.step()
        error = max(manifold.constraint_error(x))
        worst = max(worst, error) if error == error else float("inf")
    return worst


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("AdamW", {"lr": 0.15}),  # lr sqrt(n) = 0.9, below the size from which the wrong order diverges
        ("AdamW", {"lr": 1.0}),
        ("AdamW", {"lr": 0.05, "step_scale": "width"}),
        ("AdamW", {"lr": 0.1, "metric_pre": "none"}),
        ("AdamW", {"lr": 0.1, "metric_pre": "canonical", "tangent_post": "double"}),
        ("AdamW", {"lr": 0.3, "moments": "transport"}),
        ("SGD", {"lr": 1.0, "momentum": 0.9}),
        ("SGD", {"lr": 10.0, "momentum": 0.9}),
    ],
)
def test_no_leak_grows_whatever_the_optimizer(base, options):
    assert worst_leak(36, 4, 12, 120, base=base, **options) <= PROMISE


@pytest.mark.parametrize("retraction", sorted(RETRACTIONS))
def test_no_leak_grows_whatever_the_retraction(retraction):
    assert worst_leak(36, 4, 12, 80, retraction=retraction, lr=0.5) <= PROMISE


@pytest.mark.parametrize("retraction", sorted(RETRACTIONS))
def test_one_step_of_the_optimizer_removes_a_leak(retraction):
    with pytest.warns(UserWarning, match=r"before the first step .*protection 2\.9e-03"):
        assert worst_leak(36, 4, 12, 1, retraction=retraction, drift=1e-3, base="SGD", lr=1.0) <= PROMISE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k", "lr", "steps"),
    [(64, 16, 1.25, 1000), (256, 128, 0.1, 800), (1024, 256, 0.05, 400), (1024, 256, 0.3, 400), (2048, 512, 0.03, 400)],
)
def test_no_leak_grows_at_the_sizes_of_training(n, k, lr, steps):
    assert worst_leak(n, 8, k, steps, lr=lr) <= PROMISE
