"""The pymanopt twin: its solvers reach known answers, its derivatives agree with finite differences."""

import math

import numpy as np
import pymanopt
import pytest
import torch
from pymanopt.manifolds import Stiefel
from pymanopt.optimizers import ConjugateGradient, NelderMead, SteepestDescent, TrustRegions
from trace_problem import trace_problem

from manifold_cl import RestrictedStiefel as OnTensors
from manifold_cl.geometry import GeneralizedStiefel
from manifold_cl.geometry.pymanopt import RestrictedStiefel

N, M, P = 12, 4, 3
METRICS = ("euclidean", "canonical")


def basis(m=M, seed=0):
    return np.random.default_rng(seed).standard_normal((N, m))


def random_problem(manifold, seed=1):
    """The trace problem of a random A: the answer is the sum of A's largest eigenvalues on the complement of F."""
    a = np.random.default_rng(seed).standard_normal((N, N))
    a = a + a.T

    return trace_problem(manifold, a), a


def optimum(a, f):
    q = np.linalg.qr(np.hstack([f, np.random.default_rng(9).standard_normal((N, N - f.shape[1]))]))[0][:, f.shape[1] :]
    return -np.sort(np.linalg.eigvalsh(q.T @ a @ q))[-P:].sum() / 2


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    # First-order solvers run 400 steps, linearly convergent; trust regions converge quadratically.
    [(SteepestDescent, 1e-4), (ConjugateGradient, 1e-7), (TrustRegions, 1e-12)],
)
def test_solvers_reach_the_known_optimum(solver, tolerance, metric):
    f = basis()
    manifold = RestrictedStiefel(f, P, metric=metric)
    manifold.seed(3)
    problem, a = random_problem(manifold)
    np.random.seed(0)
    options = {} if solver is TrustRegions else {"max_iterations": 400}
    result = solver(verbosity=0, **options).run(problem, initial_point=manifold.random_point())
    assert abs(result.cost - optimum(a, f)) < tolerance * abs(optimum(a, f))
    assert np.abs(f.T @ result.point).max() < 1e-12
    assert np.abs(result.point.T @ result.point - np.eye(P)).max() < 1e-12


@pytest.mark.slow  # it finds a centroid by an optimization of its own in every move
def test_nelder_mead_needs_no_derivative():
    manifold = RestrictedStiefel(np.random.default_rng(0).standard_normal((5, 2)), 1)
    manifold.seed(0)
    target = manifold.random_point()

    @pymanopt.function.numpy(manifold)
    def cost(x):
        return -float((x * target).sum())

    result = NelderMead(verbosity=0, max_iterations=12).run(pymanopt.Problem(manifold, cost))
    assert result.cost < -0.99  # a simplex of 3 vertices on a 2-sphere, 12 moves


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [0, 1, M, N - P - 1])
def test_the_hessian_is_the_second_derivative_along_geodesics(metric, m):
    manifold = RestrictedStiefel(basis(m), P, metric=metric)
    manifold.seed(1)
    rng = np.random.default_rng(2)
    c, d = rng.standard_normal((N, N)), rng.standard_normal((P, P))
    x = manifold.random_point()

    def cost(x):
        return 0.5 * np.trace(x.T @ c @ x @ d) + (c[:, :P] * x).sum()

    g = 0.5 * (c @ x @ d + c.T @ x @ d.T) + c[:, :P]

    def hessian(u):
        h = 0.5 * (c @ u @ d + c.T @ u @ d.T)
        return manifold.euclidean_to_riemannian_hessian(x, g, h, u)

    u, v = manifold.random_tangent_vector(x), manifold.random_tangent_vector(x)
    t = 1e-4
    second = (cost(manifold.exp(x, t * u)) - 2 * cost(x) + cost(manifold.exp(x, -t * u))) / t**2
    first = (cost(manifold.exp(x, t * u)) - cost(manifold.exp(x, -t * u))) / (2 * t)
    gradient = manifold.euclidean_to_riemannian_gradient(x, g)
    assert manifold.inner_product(x, gradient, u) == pytest.approx(first, abs=1e-6)  # t² times the third derivative
    assert manifold.inner_product(x, hessian(u), u) == pytest.approx(second, abs=1e-5)  # rounding of cost over t²
    symmetric = manifold.inner_product(x, hessian(u), v) - manifold.inner_product(x, u, hessian(v))
    assert abs(symmetric) < 1e-12
    np.testing.assert_allclose(manifold.projection(x, hessian(u)), hessian(u), atol=1e-13)


def test_without_protected_columns_it_agrees_with_pymanopts_stiefel():
    ours, theirs = RestrictedStiefel(np.zeros((N, 0)), P, retraction="qr"), Stiefel(N, P)
    ours.seed(0)
    x, z, h = ours.random_point(), basis(P, seed=1), basis(P, seed=2)
    u = theirs.projection(x, basis(P, seed=3))
    assert ours.dim == theirs.dim
    np.testing.assert_allclose(ours.projection(x, z), theirs.projection(x, z), atol=1e-14)
    np.testing.assert_allclose(ours.retraction(x, u), theirs.retraction(x, u), atol=1e-14)
    np.testing.assert_allclose(ours.exp(x, u), theirs.exp(x, u), atol=1e-13)
    np.testing.assert_allclose(
        ours.euclidean_to_riemannian_hessian(x, z, h, u), theirs.euclidean_to_riemannian_hessian(x, z, h, u), atol=1e-13
    )


@pytest.mark.parametrize("metric", METRICS)
def test_log_undoes_exp_and_the_mean_lies_in_the_middle(metric):
    manifold = RestrictedStiefel(basis(), P, metric=metric)
    manifold.seed(4)
    x = manifold.random_point()
    u = 0.8 * manifold.random_tangent_vector(x)
    y = manifold.exp(x, u)
    np.testing.assert_allclose(manifold.log(x, y), u, atol=1e-11)  # the iteration stops at 1e-12
    middle = manifold.pair_mean(x, y)
    assert manifold.dist(x, y) == pytest.approx(0.8, abs=1e-11)
    assert manifold.dist(x, middle) == pytest.approx(manifold.dist(middle, y), abs=1e-10)


def test_several_copies_are_a_stack():
    manifold = RestrictedStiefel(basis(), P, k=5)
    manifold.seed(0)
    x = manifold.random_point()
    assert x.shape == (5, N, P)
    assert manifold.dim == 5 * RestrictedStiefel(basis(), P).dim
    u = manifold.random_tangent_vector(x)
    assert manifold.norm(x, u) == pytest.approx(1.0)
    assert manifold.dist(x, manifold.exp(x, 0.3 * u)) == pytest.approx(0.3, abs=1e-10)
    assert manifold.typical_dist == math.sqrt(5 * P)


def test_arrays_are_shared_with_torch_and_read_only_ones_are_not_written_to():
    manifold = RestrictedStiefel(torch.from_numpy(basis()), P)
    x = manifold.random_point()
    x.flags.writeable = False
    assert np.array_equal(manifold.zero_vector(x), np.zeros((N, P)))
    assert manifold.retraction(x, manifold.zero_vector(x)).flags.writeable


def test_reversed_arrays_are_taken_as_they_are():
    columns, metric = basis(), np.diag(np.linspace(1.0, 2.0, N))
    turned = columns[:, ::-1]
    manifold = RestrictedStiefel(turned, P)
    x = manifold.random_point()
    assert np.abs(columns.T @ x).max() < 1e-12
    flipped = x[:, ::-1]
    assert np.array_equal(manifold.projection(flipped, flipped), manifold.projection(flipped.copy(), flipped.copy()))
    assert torch.equal(OnTensors(turned).complement, OnTensors(turned.copy()).complement)
    assert torch.equal(GeneralizedStiefel(metric[::-1, ::-1], turned).b, torch.tensor(metric[::-1, ::-1].copy()))


def test_a_complement_without_room_is_refused():
    with pytest.raises(ValueError, match="leaves 2 free directions in R\\^12, too few for rank 3"):
        RestrictedStiefel(basis(10), P)
