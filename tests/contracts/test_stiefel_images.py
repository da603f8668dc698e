"""Scaled and generalized Stiefel manifolds: the laws of a manifold, their constraints, and what they reduce to."""

import copy
import io
import math
import pickle

import geoopt
import numpy as np
import pytest
import scipy.linalg
import torch
from pymanopt.optimizers import TrustRegions
from torch import Tensor
from trace_problem import trace_problem

from manifold_cl import RestrictedStiefel, riemannian
from manifold_cl.geometry import GeneralizedStiefel, ScaledStiefel
from manifold_cl.geometry import pymanopt as twins
from manifold_cl.geometry.testing import ManifoldContract

N, P, K = 14, 3, 4


def gaussian(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def definite(n=N, *, condition=100.0, seed=5, dtype=torch.float64):
    q = torch.linalg.qr(gaussian(n, n, seed=seed))[0]
    return (q @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T).to(dtype)


def spaces(**options):
    return {
        "scaled": ScaledStiefel(2.5, gaussian(N, K), **options),
        "scaled-free": ScaledStiefel(0.2, **options),
        "generalized": GeneralizedStiefel(definite(), gaussian(N, K), **options),
        "generalized-free": GeneralizedStiefel(definite(), **options),
    }


every = pytest.mark.parametrize("name", sorted(spaces()))
metrics = pytest.mark.parametrize("metric", ["euclidean", "canonical"])


class TestScaled(ManifoldContract):
    manifold, size = ScaledStiefel(2.5, gaussian(N, K)), (N, P)


class TestScaledCanonical(ManifoldContract):
    manifold, size = ScaledStiefel(2.5, gaussian(N, K), metric="canonical"), (N, P)


class TestGeneralized(ManifoldContract):
    manifold, size = GeneralizedStiefel(definite(), gaussian(N, K)), (N, P)


class TestGeneralizedCanonical(ManifoldContract):
    manifold, size = GeneralizedStiefel(definite(), gaussian(N, K), metric="canonical", transport="parallel"), (N, P)


def pair(space, *, seed=1):
    x = space.random(N, P, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).as_subclass(Tensor)
    return x, space.proju(x, 0.3 * gaussian(N, P, seed=seed + 1))


def constraint(space, x):
    """``xᵀx / s² − I`` or ``xᵀBx − I``."""
    square = x.T @ x / space.scale.square()[0] if isinstance(space, ScaledStiefel) else x.T @ space.b.to(x) @ x
    return float((square - torch.eye(P)).abs().max())


@every
@metrics
def test_tangent_vectors_steps_and_geodesics_satisfy_the_constraints(name, metric):
    space = spaces(metric=metric)[name]
    x, u = pair(space)
    b = space.b if isinstance(space, GeneralizedStiefel) else torch.eye(N, dtype=torch.float64)
    assert float((u.T @ b @ x + x.T @ b @ u).abs().max()) < 1e-12
    for y in (x, space.retr(x, u), space.expmap(x, u), space.projx(x + u)):
        assert constraint(space, y) < 1e-12
        if space.k:
            assert float((space.complement.T @ y).abs().max()) < 1e-13
    if space.k:
        assert float((space.complement.T @ u).abs().max()) < 1e-13


@every
@metrics
def test_exponential_logarithm_and_distance_agree(name, metric):
    space = spaces(metric=metric)[name]
    x, u = pair(space)
    scale = float(space.scale) if isinstance(space, ScaledStiefel) else 1.0
    u = scale * u / space.norm(x, u)  # an angle of 1
    y = space.expmap(x, u)
    torch.testing.assert_close(space.logmap(x, y), u, rtol=0, atol=1e-10)
    assert float(space.dist(x, y)) == pytest.approx(scale, abs=1e-10)


@metrics
def test_the_metric_is_the_documented_one(metric):
    b, half = definite(), 0.5 if metric == "canonical" else 0.0
    for space, root, unit in (
        (ScaledStiefel(2.5, metric=metric), torch.eye(N, dtype=torch.float64), 2.5),
        (GeneralizedStiefel(b, metric=metric), b, 1.0),
    ):
        x, u = pair(space)
        v = space.proju(x, gaussian(N, P, seed=7))
        expected = torch.trace(u.T @ (root - half * root @ x @ x.T @ root / unit**2) @ v)
        assert float(space.inner(x, u, v)) == pytest.approx(float(expected), abs=1e-12)
        assert space.inner(x, u, v, keepdim=True).shape == (1, 1)
        g = gaussian(N, P, seed=8)
        assert float(space.inner(x, space.egrad2rgrad(x, g), v)) == pytest.approx(float((g * v).sum()), abs=1e-12)


@metrics
def test_scale_one_and_the_identity_are_the_restricted_manifold(metric):
    plain = RestrictedStiefel(gaussian(N, K), metric=metric)
    x, u = pair(plain)
    g, h = gaussian(N, P, seed=3), gaussian(N, P, seed=4)
    for space in (
        ScaledStiefel(1.0, gaussian(N, K), metric=metric),
        GeneralizedStiefel(torch.eye(N), gaussian(N, K), metric=metric),
    ):
        for verb, args in (("retr", (u,)), ("expmap", (u,)), ("egrad2rgrad", (g,)), ("ehess2rhess", (g, h, u))):
            expected = getattr(plain, verb)(x, *args)
            torch.testing.assert_close(getattr(space, verb)(x, *args), expected, rtol=0, atol=1e-12)


def test_polar_and_cholesky_qr_are_those_of_the_b_inner_product():
    b = definite()
    for rule in ("polar", "cholesky_qr"):
        space = GeneralizedStiefel(b, gaussian(N, K), retraction=rule)
        x, u = pair(space)
        small = (x + u).T @ b @ (x + u)
        if rule == "polar":
            expected = (x + u) @ torch.from_numpy(np.linalg.inv(scipy.linalg.sqrtm(small.numpy()).real))
        else:
            expected = (x + u) @ torch.linalg.inv(torch.linalg.cholesky(small)).T
        torch.testing.assert_close(space.retr(x, u), expected, rtol=0, atol=1e-12)


def test_the_projection_goes_to_the_nearest_point_in_the_metric():
    for space in spaces().values():
        x, _ = pair(space)
        away = x + 0.2 * gaussian(N, P, seed=6)
        nearest = space.projx(away)
        best = float(space.inner(nearest, away - nearest))
        for seed in range(20):
            other = space.retr(nearest, 0.01 * space.proju(nearest, gaussian(N, P, seed=seed)))
            assert float(space.inner(nearest, away - other)) > best


@every
@pytest.mark.parametrize("make", ["geoopt", "ours"])
@pytest.mark.parametrize("steps", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_float32_steps_descend_and_hold_the_constraints(name, make, steps):
    space = spaces()[name]
    start = space.random(N, P, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    point = geoopt.ManifoldParameter(start, manifold=space)
    a = gaussian(N, N, seed=9, dtype=torch.float32)
    optimizer = (
        geoopt.optim.RiemannianAdam([point], lr=1e-2)
        if make == "geoopt"
        else riemannian(torch.optim.AdamW)([point], lr=2e-3, weight_decay=0.0)
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((a @ point) ** 2).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert max(space.constraint_error(point)) <= 2e-6  # relative; B has condition 100


def test_points_on_both_manifolds_batch_and_scales_may_differ_within_a_batch():
    scales = torch.tensor([0.5, 1.0, 3.0])
    space = ScaledStiefel(scales, gaussian(N, K))
    x = space.random(3, N, P, dtype=torch.float64).as_subclass(Tensor)
    u = space.proju(x, gaussian(3, N, P, seed=2))
    together = space.retr(x, u)
    for i, s in enumerate(scales):
        one = ScaledStiefel(float(s), gaussian(N, K))
        torch.testing.assert_close(together[i], one.retr(x[i], u[i]), rtol=0, atol=1e-13)
        torch.testing.assert_close(space.inner(x, u)[i], one.inner(x[i], u[i]), rtol=1e-12, atol=0)
    point = geoopt.ManifoldParameter(x.clone(), manifold=space)
    point.grad = gaussian(3, N, P, seed=4)
    riemannian(torch.optim.SGD)([point], lr=0.1).step()
    stepped = space.retr(x, -0.1 * space.egrad2rgrad(x, point.grad))
    torch.testing.assert_close(point.detach().as_subclass(Tensor), stepped, rtol=0, atol=1e-13)
    general = GeneralizedStiefel(definite(), gaussian(N, K))
    x = general.random(2, N, P, dtype=torch.float64).as_subclass(Tensor)
    u = general.proju(x, gaussian(2, N, P, seed=2))
    torch.testing.assert_close(general.retr(x, u)[1], general.retr(x[1], u[1]), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"scales are a batch \(3,\).*\(2, 14, 3\)"):
        geoopt.ManifoldParameter(torch.zeros(2, N, P), manifold=space)


@every
def test_copies_files_and_conversions_keep_the_manifold(name):
    space = spaces()[name]
    x, u = pair(space)
    expected = space.retr(x, u)
    file = io.BytesIO()
    torch.save(space.state_dict(), file)
    file.seek(0)
    other = GeneralizedStiefel(torch.eye(N), gaussian(N, K)) if "gen" in name else ScaledStiefel(1.0, gaussian(N, K))
    if not space.k:
        other = type(other)(torch.eye(N) if "gen" in name else 1.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    low = copy.deepcopy(space).to(torch.bfloat16)
    for twin in (copy.deepcopy(space), pickle.loads(pickle.dumps(space)), other, low):
        torch.testing.assert_close(twin.retr(x, u), expected, rtol=0, atol=1e-12)


# pymanopt -------------------------------------------------------------------------------------------


def twin_spaces(metric="euclidean"):
    f = gaussian(N, K).numpy()
    return {
        "scaled": twins.ScaledStiefel(2.5, f, P, metric=metric),
        "generalized": twins.GeneralizedStiefel(definite().numpy(), f, P, metric=metric),
    }


@pytest.mark.parametrize("name", ["scaled", "generalized"])
@metrics
def test_the_twins_hessian_is_the_second_derivative_along_geodesics(name, metric):
    manifold, rng = twin_spaces(metric)[name], np.random.default_rng(2)
    manifold.seed(1)
    c, d = rng.standard_normal((N, N)), rng.standard_normal((P, P))
    x = manifold.random_point()

    def cost(x):
        return 0.5 * np.trace(x.T @ c @ x @ d) + (c[:, :P] * x).sum()

    g = 0.5 * (c @ x @ d + c.T @ x @ d.T) + c[:, :P]

    def hessian(u):
        return manifold.euclidean_to_riemannian_hessian(x, g, 0.5 * (c @ u @ d + c.T @ u @ d.T), u)

    u, v = manifold.random_tangent_vector(x), manifold.random_tangent_vector(x)
    t = 1e-4
    ahead, back = cost(manifold.exp(x, t * u)), cost(manifold.exp(x, -t * u))
    gradient = manifold.euclidean_to_riemannian_gradient(x, g)
    assert manifold.inner_product(x, gradient, u) == pytest.approx((ahead - back) / (2 * t), abs=1e-6)
    assert manifold.inner_product(x, hessian(u), u) == pytest.approx((ahead - 2 * cost(x) + back) / t**2, abs=1e-5)
    assert abs(manifold.inner_product(x, hessian(u), v) - manifold.inner_product(x, u, hessian(v))) < 1e-12


@pytest.mark.parametrize("m", [0, K])
@metrics
def test_trust_regions_solve_the_generalised_eigenproblem_off_the_protected_directions(m, metric):
    b, f = definite().numpy(), gaussian(N, m).numpy()
    a = gaussian(N, N, seed=9).numpy()
    a = a + a.T
    manifold = twins.GeneralizedStiefel(b, f, P, metric=metric)
    manifold.seed(3)

    np.random.seed(0)
    problem = trace_problem(manifold, a)
    result = TrustRegions(verbosity=0).run(problem, initial_point=manifold.random_point())
    q = scipy.linalg.null_space(f.T) if m else np.eye(N)
    best = -scipy.linalg.eigh(q.T @ a @ q, q.T @ b @ q, eigvals_only=True)[-P:].sum() / 2
    assert result.cost == pytest.approx(best, rel=1e-12)
    assert np.abs(result.point.T @ b @ result.point - np.eye(P)).max() < 1e-12
    assert not m or np.abs(f.T @ result.point).max() < 1e-12


# Bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (torch.diag(torch.tensor([2.0, 1.0, -0.25])), r"smallest eigenvalue is -2\.50e-01"),
        (torch.diag(torch.tensor([2.0, 1.0, 0.0])), r"smallest eigenvalue is 0\.00e\+00"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), r"not symmetric: \|B − Bᵀ\| is 5\.0e-01"),
        (torch.ones(2, 3), r"\(2, 3\)"),
        (torch.full((2, 2), torch.nan), "NaN"),
    ],
)
def test_a_b_that_is_not_positive_definite_is_refused_with_its_smallest_eigenvalue(b, message):
    with pytest.raises(ValueError, match=message):
        GeneralizedStiefel(b)


def test_other_bad_input_is_refused_with_its_numbers():
    for scale in (0.0, -2.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"positive and finite, got {scale}"):
            ScaledStiefel(scale)
    with pytest.raises(ValueError, match="B has 14 rows, the complement 9"):
        GeneralizedStiefel(definite(), gaussian(9, 2))
    with pytest.raises(ValueError, match="14 rows"):
        geoopt.ManifoldParameter(torch.eye(9, 2), manifold=GeneralizedStiefel(definite()))
    with pytest.raises(ValueError, match="too few for rank 12"):
        GeneralizedStiefel(definite(), gaussian(N, K)).random(N, 12)
    for space in spaces().values():
        with pytest.raises(TypeError, match="bfloat16"):
            space.projx(torch.eye(N, P, dtype=torch.bfloat16))
