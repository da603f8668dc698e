"""The optimum of every problem against a reference that knows neither its formula nor our solvers."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from manifold_cl.lab import PROBLEMS, Problem
from manifold_cl.lab.closed_forms import Brockett, JointDiagonalisation, Nearest, PrincipalComponents, Procrustes
from manifold_cl.lab.meter import residuals
from manifold_cl.lab.network import OrthogonalLayer

SMALL = {
    "pca": PrincipalComponents(side=4, p=2, k=3),
    "brockett": Brockett(n=10, p=2, k=3),
    "procrustes": Procrustes(n=9, p=2, k=3, rows=20),
    "nearest": Nearest(n=9, p=3, k=4),
    "joint_diagonalisation": JointDiagonalisation(n=7, p=3, k=4, count=3),
    "orthogonal_layer": OrthogonalLayer(side=3, p=2, k=2, outputs=4, examples=40),
}


def reference_search(problem, seed):
    """The least cost that L-BFGS finds over unconstrained coordinates: scipy's basis of the complement, and QR."""
    n, p, k = problem.shape
    free = torch.from_numpy(scipy.linalg.null_space(problem.complement.numpy().T))

    def cost_and_gradient(coordinates):
        z = torch.from_numpy(coordinates).reshape(n - k, p).requires_grad_()
        q, r = torch.linalg.qr(free @ z)
        cost = problem.cost(q * r.diagonal().sign())
        return float(cost.detach()), torch.autograd.grad(cost, z)[0].numpy().ravel()

    start = np.random.default_rng(seed).normal(size=(n - k) * p)
    options = {"ftol": 0, "gtol": 1e-9, "maxiter": 2000}
    return scipy.optimize.minimize(cost_and_gradient, start, jac=True, method="L-BFGS-B", options=options).fun


@pytest.fixture(params=sorted(PROBLEMS), name="problem")
def small_problem(request):
    assert set(SMALL) == set(PROBLEMS), "give the new problem a small instance in SMALL"
    return SMALL[request.param]


def test_no_point_is_below_the_optimum_and_a_reference_search_reaches_it(problem):
    found = min(reference_search(problem, seed) for seed in range(4))
    scale = float(problem.cost(problem.start(0))) - problem.optimum
    assert scale > 1e-3
    # L-BFGS ends at gradients of 1e-9 or stalls before; costs are good to about the square of a gradient.
    assert found - problem.optimum == pytest.approx(0, abs=1e-8 * scale)
    random = min(float(problem.cost(problem.start(seed))) for seed in range(50))
    assert random > problem.optimum


def test_derivatives_equal_those_of_autograd_and_of_differences(problem):
    draw = torch.Generator().manual_seed(0)
    x = problem.start(0) + 0.1 * torch.randn(problem.start(0).shape, dtype=torch.float64, generator=draw)
    v = torch.randn(x.shape, dtype=torch.float64, generator=draw)
    assert torch.allclose(problem.gradient(x), Problem.gradient(problem, x), atol=1e-13)
    assert torch.allclose(problem.hessian(x, v), Problem.hessian(problem, x, v), atol=1e-13)
    t = 1e-5
    change = (problem.gradient(x + t * v) - problem.gradient(x - t * v)) / (2 * t)
    assert torch.allclose(problem.hessian(x, v), change, atol=1e-8)  # differences with t = 1e-5 are good to t²


def test_starts_are_points_and_depend_on_their_seed_alone(problem):
    x = problem.start(3)
    assert torch.equal(x, problem.start(3))
    assert not torch.equal(x, problem.start(4))
    assert max(residuals(problem.manifold(), x)) < 1e-14
    assert x.shape == problem.shape[:2]


def test_the_gradient_of_every_problem_pulls_off_the_complement(problem):
    """Else a step that ignores F would not leak, and the lab could not find it."""
    pull = problem.complement.mT @ problem.gradient(problem.start(0))
    assert pull.abs().max() > 1e-3 * problem.gradient(problem.start(0)).abs().max()


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_full_size_problems_have_the_optimum_of_a_dense_reference(name):
    problem = PROBLEMS[name]()
    assert problem.name == name
    free = scipy.linalg.null_space(problem.complement.numpy().T)
    assert free.shape[1] == problem.shape[0] - problem.shape[2]
    if name == "pca":
        values = np.linalg.eigvalsh(free.T @ problem.matrix.numpy() @ free)
        assert problem.optimum == pytest.approx(-values[-problem.p :].sum() / 2, rel=1e-10)
        assert values[-1] == pytest.approx(1, rel=1e-10)
    elif name == "nearest":
        nearest = torch.from_numpy(free @ scipy.linalg.polar(free.T @ problem.target.numpy())[0])
        assert problem.optimum == pytest.approx(float(problem.cost(nearest)), rel=1e-12)
    elif name in ("procrustes", "orthogonal_layer"):
        assert float(problem.cost(problem.solution)) == pytest.approx(0, abs=1e-30)
        assert max(residuals(problem.manifold(), problem.solution)) < 1e-13
    elif name == "joint_diagonalisation":
        shared = np.linalg.eigh(free.T @ problem.matrices[0].numpy() @ free)[1]
        assert float(problem.cost(torch.from_numpy(free @ shared))) == pytest.approx(problem.optimum, rel=1e-10)
    else:
        values, vectors = np.linalg.eigh(free.T @ problem.matrix.numpy() @ free)
        best = torch.from_numpy(free @ vectors[:, : problem.p])
        assert float(problem.cost(best)) == pytest.approx(problem.optimum, rel=1e-12)


def test_a_problem_is_a_value():
    assert replace(SMALL["nearest"], p=2) == Nearest(n=9, p=2, k=4)
    assert "n=9" in repr(SMALL["nearest"])
