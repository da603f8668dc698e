"""Ways back: logarithms and distances in both metrics, inverse retractions, and where they end."""

import math

import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel
from manifold_cl.geometry.retractions import Invertible
from manifold_cl.linalg import log_orthogonal, matrix_exp, solve_sylvester

metrics = pytest.mark.parametrize("metric", ["euclidean", "canonical"])
sizes = pytest.mark.parametrize(("n", "p", "k"), [(20, 4, 5), (20, 4, 0), (20, 4, 1), (9, 5, 2), (8, 4, 4), (12, 1, 3)])


def gaussian(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def setting(manifold, *size, length, dtype=torch.float64):
    """A point and a tangent vector of the given length in the manifold's metric."""
    x = manifold.random(*size, dtype=dtype, generator=torch.Generator().manual_seed(1)).as_subclass(torch.Tensor)
    u = manifold.proju(x, gaussian(*size, seed=2, dtype=dtype))
    return x, length * u / manifold.norm(x, u, keepdim=True)


@metrics
@sizes
@pytest.mark.parametrize("length", [1e-8, 0.5, 1.0, 2.0, 2.7])
def test_the_logarithm_inverts_the_exponential(metric, n, p, k, length):
    manifold = RestrictedStiefel(gaussian(n, k), metric=metric)
    x, u = setting(manifold, 5, n, p, length=length)
    y = manifold.expmap(x, u)
    found = manifold.logmap(x, y)
    torch.testing.assert_close(found, u, rtol=0, atol=3e-12)  # measured: 1e-14 to 2e-12 by length
    torch.testing.assert_close(manifold.dist(x, y), torch.full((5,), length, dtype=torch.float64), rtol=0, atol=3e-12)
    torch.testing.assert_close(manifold.dist(y, x), manifold.dist(x, y), rtol=0, atol=3e-12)
    assert manifold.check_vector_on_tangent(x, found, atol=1e-13)


@metrics
@pytest.mark.parametrize(("n", "p", "k"), [(9, 5, 2), (12, 4, 6), (20, 8, 5)])
def test_where_the_free_space_is_narrow_no_pair_within_the_radius_is_missed(metric, n, p, k):
    # Fewer than 2p free dimensions: the completion uses directions that are not there, and may need a mirror.
    manifold = RestrictedStiefel(gaussian(n, k), metric=metric)
    x, u = setting(manifold, 100, n, p, length=2.7)
    torch.testing.assert_close(manifold.logmap(x, manifold.expmap(x, u)), u, rtol=0, atol=1e-11)  # 60 passes at most


@metrics
def test_a_short_logarithm_in_float32_has_float32_digits(metric):
    manifold = RestrictedStiefel(gaussian(20, 5, dtype=torch.float32), metric=metric)
    x, u = setting(manifold, 20, 4, length=0.7, dtype=torch.float32)
    found = manifold.logmap(x, manifold.expmap(x, u))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, u, rtol=0, atol=1e-6)  # a few float32 roundings of the two points


@metrics
def test_points_beyond_the_injectivity_radius_get_no_logarithm(metric):
    manifold = RestrictedStiefel(gaussian(20, 5), metric=metric)
    x, u = setting(manifold, 20, 4, length=5.0)
    with pytest.raises(ValueError, match=r"injectivity radius|no geodesic"):
        manifold.logmap(x, manifold.expmap(x, u))
    sphere = RestrictedStiefel(gaussian(9, 2), metric=metric)
    x, u = setting(sphere, 9, 1, length=5.0)
    shorter = sphere.dist(x, sphere.expmap(x, u))
    # One column: a great circle, which is 2π around; the canonical metric is the same there.
    assert float(shorter) == pytest.approx(2 * math.pi - 5, abs=1e-12)


@metrics
def test_the_distance_at_a_point_itself_is_zero_and_has_a_zero_gradient(metric):
    manifold = RestrictedStiefel(gaussian(12, 3), metric=metric)
    x = manifold.random(12, 4, generator=torch.Generator().manual_seed(1)).as_subclass(torch.Tensor)
    y = x.clone().requires_grad_()
    length = manifold.dist(x, y)
    length.backward()
    assert float(length.detach()) < 1e-14  # rounding of float64
    assert bool(y.grad.isfinite().all())


@metrics
def test_the_gradient_of_the_distance_points_along_the_geodesic(metric):
    manifold = RestrictedStiefel(gaussian(12, 3), metric=metric)
    x, u = setting(manifold, 12, 4, length=1.0)
    y = manifold.expmap(x, u).requires_grad_()
    x = x.requires_grad_()
    manifold.dist(x, y).backward()
    with torch.no_grad():
        for here, there in ((x, y), (y, x)):
            w = manifold.proju(here, gaussian(12, 4, seed=5))
            h = 1e-4
            ends = [manifold.dist(manifold.expmap(here, s * w), there) for s in (h, -h)]
            slope = float(ends[0] - ends[1]) / (2 * h)
            assert float((here.grad * w).sum()) == pytest.approx(slope, abs=1e-6)  # h² times a third derivative


@metrics
def test_the_distance_obeys_the_triangle_inequality_and_keeps_dimensions(metric):
    manifold = RestrictedStiefel(gaussian(12, 3), metric=metric)
    x, u = setting(manifold, 4, 12, 4, length=0.8)
    y, v = manifold.expmap(x, u), manifold.proju(x, gaussian(4, 12, 4, seed=7))
    z = manifold.expmap(x, 0.8 * v / manifold.norm(x, v, keepdim=True))
    assert bool((manifold.dist(y, z) <= manifold.dist(x, y) + manifold.dist(x, z)).all())
    assert manifold.dist(x, y, keepdim=True).shape == (4, 1, 1)


@metrics
def test_the_square_case_has_two_components(metric):
    basis = torch.linalg.qr(gaussian(9, 6))[0]
    manifold = RestrictedStiefel(basis, metric=metric)
    assert manifold.dim(9, 3) == 3  # of the rotations of R³
    frame = torch.linalg.qr(torch.cat([basis, gaussian(9, 3, seed=3)], dim=1))[0][:, 6:]
    x = manifold.random(200, 9, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    signs = torch.linalg.det(frame.mT @ x)
    torch.testing.assert_close(signs.abs(), torch.ones(200).double(), rtol=0, atol=1e-13)  # rounding
    assert 70 < int((signs > 0).sum()) < 130  # a fair coin, 200 throws: four standard deviations
    u = manifold.proju(x, gaussian(200, 9, 3, seed=4))
    for moved in (manifold.retr(x, u), manifold.expmap(x, u)):
        torch.testing.assert_close(torch.linalg.det(frame.mT @ moved), signs, rtol=0, atol=1e-12)  # never crosses
    mirrored = x[0] * torch.tensor([1.0, 1.0, -1.0]).double()
    with pytest.raises(ValueError, match=r"no geodesic from x to y was found"):
        manifold.logmap(x[0], mirrored)
    with pytest.raises(ValueError, match="does not reach y from x"):
        manifold.inverse_retr(x[0], mirrored)


@metrics
@sizes
@pytest.mark.parametrize("name", sorted(name for name, rule in RETRACTIONS.items() if isinstance(rule, Invertible)))
def test_inverse_retractions_come_back(name, metric, n, p, k):
    manifold = RestrictedStiefel(gaussian(n, k), retraction=name, metric=metric)
    x, u = setting(manifold, 5, n, p, length=1.0)
    # The condition of the p × p systems at length 1 is below 100.
    torch.testing.assert_close(manifold.inverse_retr(x, manifold.retr(x, u)), u, rtol=0, atol=1e-12)


def test_the_family_of_closed_inverses_is_the_promised_one():
    have = {name for name, rule in RETRACTIONS.items() if isinstance(rule, Invertible)}
    assert have == {
        "polar",
        "polar_svd",
        "newton_schulz",
        "qr",
        "cholesky_qr",
        "cayley",
        "polar_light",
        "quasi_geodesic",
    }
    manifold = RestrictedStiefel(retraction="exponential")
    x = manifold.random(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"'exponential' has no closed-form inverse \(these have: cayley"):
        manifold.inverse_retr(x, x)


@pytest.mark.parametrize("verb", ["logmap", "dist", "inverse_retr"])
def test_what_is_no_point_is_refused(verb):
    manifold = RestrictedStiefel(gaussian(9, 2))
    x = manifold.random(9, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    back = getattr(manifold, verb)
    with pytest.raises(ValueError, match="NaN or infinite"):
        back(x, x * torch.nan)
    with pytest.raises(ValueError, match=r"off the manifold: max\|xᵀx − I\|"):
        back(x, 1.1 * x)
    with pytest.raises(ValueError, match="protected subspace; project it with projx"):
        back(torch.linalg.qr(gaussian(9, 3))[0], x)
    with pytest.raises(ValueError, match="9 rows as the complement has"):
        back(x[:8], x[:8])
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
        unchecked(back)(manifold, x.bfloat16(), x)


def unchecked(method):
    """The method without the tests' shape checker, which would speak first."""
    function = method.__func__
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return torch.no_grad()(function)


def test_an_orthogonal_logarithm_has_every_digit():
    skew = gaussian(50, 6, 6)
    skew = skew - skew.mT
    for largest in (1e-6, 0.03, 1.0, 2.8, 3.1):
        s = largest * skew / torch.linalg.matrix_norm(skew, 2, keepdim=True)
        # Close to π the logarithm itself is ill-conditioned: 1 / (π − 3.1) is 24.
        torch.testing.assert_close(log_orthogonal(matrix_exp(s)), s, rtol=0, atol=3e-13)


def test_a_sylvester_equation_is_solved_to_its_condition():
    a, b, x = gaussian(20, 5, 5), gaussian(20, 5, 5, seed=1), gaussian(20, 5, 5, seed=2)
    a, b = a @ a.mT + 0.1 * torch.eye(5), b @ b.mT + 0.1 * torch.eye(5) + (b - b.mT)
    found = solve_sylvester(a, b, a @ x + x @ b)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-11)  # conditions up to 100 on solutions of size 1


def test_the_exponential_of_a_single_matrix_is_as_good_as_that_of_a_batch():
    a = gaussian(8, 8)
    a = (a - a.mT) / torch.linalg.matrix_norm(a - a.mT, 1)
    for size in torch.logspace(-4, 1, 60).double():
        together = torch.matrix_exp((size * a).expand(3, 8, 8))[0]
        # torch's own path for one matrix is 1e-11 off at sizes between 0.02 and 0.05.
        torch.testing.assert_close(matrix_exp(size * a), together, rtol=0, atol=1e-15)
