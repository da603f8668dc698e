"""The family of metrics around the Euclidean and the canonical one: derivatives, geodesics, distances, transports."""

import math

import numpy as np
import pytest
import torch
from geoopt import ManifoldParameter
from pymanopt.optimizers import TrustRegions
from trace_problem import trace_problem

from manifold_cl import RestrictedStiefel, RiemannianSGD, check_retraction
from manifold_cl.geometry import BetaMetric, check_gradient, check_hessian, check_projection, check_transport
from manifold_cl.geometry.metrics import METRICS, geodesic
from manifold_cl.geometry.pymanopt import RestrictedStiefel as Twin
from manifold_cl.geometry.retractions import ExponentialBeta

BETAS = [0.1, 0.4, 0.75, 1.6]
betas = pytest.mark.parametrize("beta", BETAS)
named = pytest.mark.parametrize(("beta", "name"), [(1.0, "euclidean"), (0.5, "canonical")])


def gaussian(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def setting(manifold, *size, length=1.0):
    """A point and two tangent vectors, the first of the given length in the manifold's metric."""
    x = manifold.random(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.as_subclass(torch.Tensor)
    u, v = (manifold.proju(x, gaussian(*size, seed=s)) for s in (2, 3))
    return x, length * u / manifold.norm(x, u, keepdim=True), v


@named
def test_the_formulas_of_the_family_equal_those_of_the_two_named_metrics(beta, name):
    family, metric = BetaMetric(beta), METRICS[name]
    x, u, v = setting(RestrictedStiefel(), 3, 20, 4)
    g, h = gaussian(3, 20, 4, seed=5), gaussian(3, 20, 4, seed=6)
    pairs = [
        (family.inner(x, u, v), metric.inner(x, u, v)),
        (family.lowered(x, u), metric.lowered(x, u)),
        (family.gradient(x, g), metric.gradient(x, g)),
        (family.hessian(x, g, h, u), metric.hessian(x, g, h, u)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-14)  # sums of 80 terms of size 1
    assert family.twist == metric.twist
    assert family.radius == pytest.approx(metric.radius, rel=5e-3)  # of the canonical one the source gives two digits
    assert family.radius >= metric.radius


@named
def test_a_named_member_is_replaced_by_its_name(beta, name):
    manifold = RestrictedStiefel(gaussian(12, 3), metric=BetaMetric(beta))
    assert manifold.metric == name
    assert manifold.retraction == RestrictedStiefel(metric=name).retraction


@betas
def test_the_metric_weighs_the_rotation_inside_by_beta(beta):
    manifold = RestrictedStiefel(gaussian(20, 5), metric=BetaMetric(beta))
    x, u, v = setting(manifold, 3, 20, 4)
    a, c = x.mT @ u, x.mT @ v
    outside = ((u - x @ a) * (v - x @ c)).sum((-2, -1))
    expected = beta * (a * c).sum((-2, -1)) + outside
    torch.testing.assert_close(manifold.inner(x, u, v), expected, rtol=0, atol=1e-14)
    assert manifold.inner(x, u, v, keepdim=True).shape == (3, 1, 1)
    assert "beta=" in repr(manifold)


@betas
@pytest.mark.parametrize("k", [0, 3, 8], ids=["none", "some", "square"])
def test_gradient_and_hessian_agree_with_finite_differences(beta, k):
    manifold = RestrictedStiefel(gaussian(12, k), metric=BetaMetric(beta))
    assert check_projection(manifold, 12, 4).failures() == ()
    c, d = gaussian(12, 12, seed=4), gaussian(4, 4, seed=5)

    def cost(y):
        return 0.5 * torch.trace(y.mT @ c @ y @ d) + (c[:, :4] * y).sum()

    assert check_gradient(manifold, cost, size=(12, 4)).failures() == ()
    assert check_hessian(manifold, cost, size=(12, 4), seed=1).failures() == ()


@betas
def test_gradient_and_hessian_equal_those_in_coordinates(beta):
    """A dense twin: the metric as a matrix in a basis of the tangent space, derivatives along its geodesics."""
    n, p = 7, 3
    manifold = RestrictedStiefel(gaussian(n, 1), metric=BetaMetric(beta))
    x, _, _ = setting(manifold, n, p)
    c, d = gaussian(n, n, seed=4), gaussian(p, p, seed=5)

    def cost(y):
        return 0.5 * torch.trace(y.mT @ c @ y @ d) + (c[:, :p] * y).sum()

    projected = torch.stack([manifold.proju(x, e.reshape(n, p)) for e in torch.eye(n * p, dtype=torch.float64)])
    left, sigma, _ = torch.linalg.svd(projected.reshape(n * p, -1).mT)
    basis = [left[:, i].reshape(n, p) for i in range(int((sigma > 0.5).sum()))]
    weights = torch.stack([torch.stack([manifold.inner(x, a, b) for b in basis]) for a in basis])

    def at(coordinates):
        return cost(geodesic(x, sum(t * e for t, e in zip(coordinates, basis, strict=True)), twist=2 * beta))

    zero = torch.zeros(len(basis), dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(at, zero)
    curvature = torch.autograd.functional.hessian(at, zero)
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(cost(y), y)
    expected = sum(t * e for t, e in zip(torch.linalg.solve(weights, slopes), basis, strict=True))
    torch.testing.assert_close(manifold.egrad2rgrad(x, g), expected, rtol=0, atol=1e-11)  # autograd of an exponential
    for i, u in enumerate(basis[:3]):
        h = (c @ u @ d + c.mT @ u @ d.mT) / 2
        column = torch.linalg.solve(weights, curvature[:, i])
        expected = sum(t * e for t, e in zip(column, basis, strict=True))
        torch.testing.assert_close(manifold.ehess2rhess(x, g, h, u), expected, rtol=0, atol=1e-10)


@betas
def test_a_geodesic_has_constant_speed_and_no_tangent_acceleration(beta):
    metric = BetaMetric(beta)
    manifold = RestrictedStiefel(gaussian(20, 5), metric=metric)
    x, u, _ = setting(manifold, 20, 4)
    for t in (0.0, 0.7):
        path = [manifold.expmap(x, (t + i * 1e-3) * u) for i in (-2, -1, 0, 1, 2)]
        velocity = (8 * (path[3] - path[1]) - (path[4] - path[0])) / 12e-3
        acceleration = (16 * (path[3] + path[1]) - (path[4] + path[0]) - 30 * path[2]) / 12e-6
        y, v = path[2], manifold.proju(path[2], velocity)
        assert float(manifold.norm(y, v)) == pytest.approx(1, abs=1e-10)
        a = y.mT @ v
        b = v - y @ a
        # Of the metric's Levi-Civita connection: docs/geometry.md, "The family of metrics".
        covariant = manifold.proju(y, acceleration) - 2 * (1 - beta) * b @ a
        assert float(covariant.norm()) < 1e-8  # rounding of positions over the square of 1e-3


@pytest.mark.parametrize("beta", [0.4, 1.6])
def test_the_geodesic_as_a_retraction_is_exact_in_its_metric_only(beta):
    rule = ExponentialBeta(beta)
    report = check_retraction(rule, BetaMetric(beta), steps=50)
    assert report.failures() == ()
    assert math.isinf(report.geodesic_slope)
    assert check_retraction(rule, "euclidean", steps=1).geodesic_slope == pytest.approx(2, abs=0.05)
    assert RestrictedStiefel(metric=BetaMetric(beta)).retraction == rule
    with pytest.raises(ValueError, match=r"'polar' declares its order for euclidean, canonical, not 'beta_"):
        check_retraction("polar", BetaMetric(beta))


@pytest.mark.parametrize("beta", [0.1, 0.4, 0.75])
@pytest.mark.parametrize(("n", "p", "k"), [(20, 4, 5), (9, 5, 2), (8, 4, 4), (12, 1, 3)])
@pytest.mark.parametrize("share", [1e-8, 0.5, 0.9])
def test_the_logarithm_inverts_the_exponential_within_the_radius(beta, n, p, k, share):
    metric = BetaMetric(beta)
    manifold = RestrictedStiefel(gaussian(n, k), metric=metric)
    x, u, _ = setting(manifold, 5, n, p, length=share * metric.radius)
    y = manifold.expmap(x, u)
    torch.testing.assert_close(manifold.logmap(x, y), u, rtol=0, atol=3e-12)  # measured: at most 1e-13
    expected = torch.full((5,), share * metric.radius, dtype=torch.float64)
    torch.testing.assert_close(manifold.dist(y, x), expected, rtol=0, atol=3e-12)


def test_the_radius_is_continuous_and_meets_the_published_values():
    # stoye2025shortest: exact outside (1/3, 2/3); 4/5 is rentmeesters2013algorithms'.
    for beta, value in [(0.08, 0.4), (1 / 3, math.sqrt(2 / 3)), (0.5, math.sqrt(0.8)), (2 / 3, 1.0), (1.0, 1.0)]:
        assert BetaMetric(beta).radius == pytest.approx(value * math.pi, rel=1e-12)


def test_a_logarithm_that_need_not_be_the_shortest_is_refused():
    manifold = RestrictedStiefel(gaussian(20, 5), metric=BetaMetric(1.6))
    x, u, _ = setting(manifold, 20, 4, length=0.5)
    with pytest.raises(ValueError, match=r"0\.500 away .*need not be the shortest.*BetaMetric\(beta=1\.6\)"):
        manifold.logmap(x, manifold.expmap(x, u))
    short = RestrictedStiefel(gaussian(20, 5), metric=BetaMetric(0.1))
    x, u, _ = setting(short, 20, 4, length=1.42)
    with pytest.raises(ValueError, match=r"beta_0\.1 injectivity radius is known to be at least 1\.405"):
        short.logmap(x, short.expmap(x, u))


def test_the_gradient_of_the_distance_points_along_the_geodesic():
    manifold = RestrictedStiefel(gaussian(12, 3), metric=BetaMetric(0.75))
    x, u, w = setting(manifold, 12, 4)
    y = manifold.expmap(x, u)
    x = x.requires_grad_()
    manifold.dist(x, y).backward()
    with torch.no_grad():
        ends = [manifold.dist(manifold.expmap(x, s * w), y) for s in (1e-4, -1e-4)]
        # 1e-8 times a third derivative.
        assert float((x.grad * w).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-4, abs=1e-6)


@betas
@pytest.mark.parametrize("transport", ["projection", "differentiated", "isometric"])
def test_transports_obey_their_laws_in_the_family(beta, transport):
    manifold = RestrictedStiefel(gaussian(12, 3), metric=BetaMetric(beta), transport=transport)
    report = check_transport(manifold, 12, 4)
    assert report.failures() == ()
    assert report.reversible == (transport == "isometric")


def test_the_isometric_transport_keeps_inner_products_of_every_member():
    x, u, v = setting(RestrictedStiefel(gaussian(12, 3)), 12, 4, length=2.0)
    for beta in BETAS:
        manifold = RestrictedStiefel(gaussian(12, 3), metric=BetaMetric(beta), transport="isometric")
        y, there = manifold.retr_transp(x, u, v)
        assert float(manifold.inner(y, there)) == pytest.approx(float(manifold.inner(x, v)), abs=1e-13)


@pytest.mark.parametrize("retraction", ["polar", None])
def test_an_optimizer_descends_along_the_gradient_of_the_metric(retraction):
    # The optimizers have a fast path for the polar retraction, which must not take the Euclidean gradient here.
    manifold = RestrictedStiefel(gaussian(20, 5), metric=BetaMetric(0.3), retraction=retraction)
    x, _, _ = setting(manifold, 20, 4)
    point = ManifoldParameter(x.clone(), manifold=manifold)
    point.grad = gaussian(20, 4, seed=7)
    RiemannianSGD([point], lr=0.05).step()
    expected = manifold.retr(x, -0.05 * manifold.egrad2rgrad(x, point.grad))
    torch.testing.assert_close(point.detach().as_subclass(torch.Tensor), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("beta", [0.3, 1.6])
def test_trust_regions_reach_the_known_optimum_through_the_pymanopt_twin(beta):
    f = np.random.default_rng(0).standard_normal((12, 4))
    a = np.random.default_rng(1).standard_normal((12, 12))
    a = a + a.T
    manifold = Twin(f, 3, metric=BetaMetric(beta))
    assert f"beta_{beta} metric" in str(manifold)
    manifold.seed(3)

    problem = trace_problem(manifold, a)
    np.random.seed(0)
    result = TrustRegions(verbosity=0).run(problem, initial_point=manifold.random_point())
    q = np.linalg.qr(np.hstack([f, np.eye(12)[:, :8]]))[0][:, 4:]
    best = -np.sort(np.linalg.eigvalsh(q.T @ a @ q))[-3:].sum() / 2
    assert result.cost == pytest.approx(best, abs=1e-10)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_beta_that_is_no_metric_is_refused(beta):
    with pytest.raises(ValueError, match=rf"^beta, .* number, got {beta}"):
        BetaMetric(beta)
    with pytest.raises(ValueError, match=r"^beta, which is 1 for"):
        ExponentialBeta(beta)


def test_parallel_transport_is_refused_outside_the_canonical_metric():
    with pytest.raises(ValueError, match=r"needs metric='canonical'.*BetaMetric\(beta=0\.75\)"):
        RestrictedStiefel(metric=BetaMetric(0.75), transport="parallel")


def curvature(x, y, p, beta):
    """The sectional curvature of the plane of two skew generators of St(n, p) = SO(n) / SO(n − p).

    The formula for a homogeneous space with an invariant metric (Besse, Einstein Manifolds, theorem 7.30).
    """

    def horizontal(a):
        mask = torch.ones_like(a)
        mask[p:, p:] = 0
        return a * mask

    def inner(a, b):
        return beta * (a[..., :p, :p] * b[:p, :p]).sum((-2, -1)) + (a[..., p:, :p] * b[p:, :p]).sum((-2, -1))

    def bracket(a, b):
        return a @ b - b @ a

    n = x.shape[-1]
    rows, columns = zip(*[(i, j) for i in range(n) for j in range(min(i, p))], strict=True)
    units = torch.zeros(len(rows), n, n, dtype=x.dtype)
    index = torch.arange(len(rows))
    weights = torch.tensor([1 / math.sqrt(2 * beta) if i < p else 1.0 for i in rows], dtype=x.dtype)
    units[index, rows, columns] = weights
    units = units - units.mT

    def mixed(a, b):
        values = (inner(bracket(units, a), b) + inner(bracket(units, b), a)) / 2
        return torch.einsum("i,ijk->jk", values, units)

    x = x / inner(x, x).sqrt()
    y = y - inner(x, y) * x
    y = y / inner(y, y).sqrt()
    whole = bracket(x, y)
    flat = -0.75 * inner(horizontal(whole), horizontal(whole))
    flat = flat - inner(horizontal(bracket(x, whole)), y) / 2 - inner(horizontal(bracket(y, -whole)), x) / 2
    both = mixed(x, y)
    return flat + inner(both, both) - inner(mixed(x, x), mixed(y, y))


@pytest.mark.slow  # an ascent of its own per metric
@pytest.mark.parametrize(("beta", "largest"), [(0.4, 1.4), (0.5, 1.25), (0.6, 1.1)])
def test_the_largest_sectional_curvature_is_the_one_of_the_radius(beta, largest):
    n, p = 4, 2
    best = -math.inf
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        mask = torch.ones(n, n, dtype=torch.float64)
        mask[p:, p:] = 0
        planes = [torch.randn(n, n, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(2)]
        ascent = torch.optim.Adam(planes, lr=0.05, maximize=True)
        for _ in range(250):
            ascent.zero_grad()
            value = curvature(*(mask * (a - a.mT) for a in planes), p, beta)
            value.backward()
            ascent.step()
        best = max(best, float(value.detach()))
    assert best == pytest.approx(largest, abs=1e-3)  # what an ascent of 250 steps leaves
    assert best <= largest + 1e-9
