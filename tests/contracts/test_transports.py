"""Laws of the vector transports, and of the metrics they belong to."""

import geoopt
import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel
from manifold_cl.geometry import check_projection
from manifold_cl.geometry.checks.measure import finite_difference
from manifold_cl.geometry.transports import differential, parallel_canonical

metrics = pytest.mark.parametrize("metric", ["euclidean", "canonical"])
complements = pytest.mark.parametrize("k", [0, 1, 8], ids=["none", "one", "square"])


def gaussian(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def setting(manifold, *size, length=1.0):
    """A point and two tangent vectors of the given Frobenius length."""
    x = manifold.random(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.as_subclass(torch.Tensor)
    u, v = (manifold.proju(x, gaussian(*size, seed=s)) for s in (2, 3))
    return x, *(length * w / torch.linalg.matrix_norm(w, keepdim=True) for w in (u, v))


@metrics
@complements
@pytest.mark.parametrize("name", sorted(RETRACTIONS))
def test_the_differentiated_transport_is_the_derivative_of_the_retraction(name, metric, k):
    manifold = RestrictedStiefel(gaussian(12, k), retraction=name, metric=metric, transport="differentiated")
    x, u, v = setting(manifold, 3, 12, 4, length=0.5)
    y, there = manifold.retr_transp(x, u, v)
    torch.testing.assert_close(y, manifold.retr(x, u), rtol=0, atol=0)
    assert manifold.check_vector_on_tangent(y, there, atol=1e-13)  # a dozen float64 roundings
    difference = finite_difference(lambda t: manifold.retr(x, u + t * v))
    torch.testing.assert_close(there, difference, rtol=0, atol=1e-9)  # what the differences allow at a step of 1e-3
    torch.testing.assert_close(manifold.transp_follow_retr(x, u, v), there, rtol=0, atol=0)


def test_a_function_of_ones_own_is_differentiated_by_torch():
    manifold = RestrictedStiefel(gaussian(12, 3), transport="differentiated", retraction=lambda x, u: ns(x + u))
    x, u, v = setting(manifold, 12, 4, length=0.5)
    polar = RETRACTIONS["polar"]
    torch.testing.assert_close(
        manifold.transp_follow_retr(x, u, v), differential(polar, x, u, v), rtol=0, atol=1e-13
    )  # the polar factor by 30 cubic steps, to rounding


def ns(y):
    y = y / 2
    for _ in range(30):
        y = y @ (3 * torch.eye(y.shape[-1], dtype=y.dtype) - y.mT @ y) / 2
    return y


@metrics
@complements
def test_the_isometric_transport_keeps_inner_products_and_is_undone(metric, k):
    manifold = RestrictedStiefel(gaussian(12, k), metric=metric, transport="isometric")
    assert manifold.reversible
    assert manifold.retraction.name == "cayley"
    check_isometry(manifold, length=2.0)


@complements
@pytest.mark.parametrize("length", [1e-3, 1.0, 6.0])
def test_parallel_transport_keeps_inner_products_and_is_undone(k, length):
    manifold = RestrictedStiefel(gaussian(12, k), metric="canonical", transport="parallel")
    assert manifold.reversible
    assert manifold.retraction.name == "exponential_canonical"
    check_isometry(manifold, length=length)


def check_isometry(manifold, length):
    x, u, v = setting(manifold, 3, 12, 4, length=length)
    y, there = manifold.retr_transp(x, u, v)
    along = manifold.transp_follow_retr(x, u, u)
    tolerance = 1e-13 * max(1, length**2)  # fifty terms of size length²
    assert manifold.check_vector_on_tangent(y, there, atol=tolerance)
    for a, b, c, d in ((there, there, v, v), (there, along, v, u), (along, along, u, u)):
        torch.testing.assert_close(manifold.inner(y, a, b), manifold.inner(x, c, d), rtol=0, atol=tolerance)
    back, again = manifold.retr_transp(y, -along, there)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(again, v, rtol=0, atol=tolerance)


def test_parallel_transport_equals_its_dense_definition():
    manifold = RestrictedStiefel(gaussian(12, 3), metric="canonical")
    x, u, v = setting(manifold, 12, 4, length=1.5)
    outside = torch.eye(12, dtype=torch.float64) - x @ x.mT

    def generator(w):
        a, b = x.mT @ w, outside @ w
        return x @ a @ x.mT + b @ x.mT - x @ b.mT

    s, t = generator(u), generator(v)
    term = t
    for i in range(1, 60):  # e^(−ad_s / 2) on generators of horizontal form, as a series: 1.5⁶⁰/60! is nothing
        term = (term @ s - s @ term) / (2 * i)
        term = term - outside @ term @ outside
        t = t + term
    # Fifty float64 products.
    torch.testing.assert_close(parallel_canonical(x, u, v), torch.matrix_exp(s) @ t @ x, rtol=0, atol=1e-13)


def test_a_geodesic_carries_its_own_velocity():
    manifold = RestrictedStiefel(gaussian(12, 3), metric="canonical", transport="parallel")
    x, u, _ = setting(manifold, 12, 4, length=1.0)
    velocity = finite_difference(lambda t: manifold.expmap(x, (1 + t) * u))
    torch.testing.assert_close(
        manifold.transp_follow_expmap(x, u, u), velocity, rtol=0, atol=1e-10
    )  # of the differences


@metrics
def test_projection_is_the_default_and_contracts(metric):
    manifold = RestrictedStiefel(gaussian(12, 3), metric=metric, retraction="polar")
    assert not manifold.reversible
    x, u, v = setting(manifold, 12, 4, length=1.2)
    y, there = manifold.retr_transp(x, u, v)
    torch.testing.assert_close(there, manifold.proju(y, v), rtol=0, atol=0)
    assert float(there.norm()) < float(v.norm())


@pytest.mark.parametrize("retraction", ["cayley", "iterative_cayley"])
def test_the_cayley_retractions_carry_vectors_by_their_derivative_unless_told_otherwise(retraction):
    manifold = RestrictedStiefel(gaussian(12, 3), retraction=retraction)
    assert manifold.transport == "differentiated"
    x, u, v = setting(manifold, 12, 4, length=1.2)
    carried = finite_difference(lambda t: manifold.retr(x, u + t * v))
    torch.testing.assert_close(manifold.retr_transp(x, u, v)[1], carried, rtol=0, atol=1e-9)  # fourth-order differences
    assert RestrictedStiefel(retraction=retraction, transport="projection").transport == "projection"
    assert RestrictedStiefel(metric="canonical").transport == "differentiated"  # whose retraction is Cayley's


@metrics
@complements
def test_gradients_pair_with_their_metric(metric, k):
    manifold = RestrictedStiefel(gaussian(12, k), metric=metric)
    assert check_projection(manifold, 12, 4).failures() == ()
    x, u, v = setting(manifold, 12, 4)
    inside = (x.mT @ u * (x.mT @ v)).sum()
    expected = (u * v).sum() - (inside / 2 if metric == "canonical" else 0)
    torch.testing.assert_close(manifold.inner(x, u, v), expected, rtol=0, atol=1e-15)  # sums of 48 terms below 0.1
    assert manifold.inner(x, u, v, keepdim=True).shape == (1, 1)
    assert float(manifold.norm(x, u)) == pytest.approx(float(manifold.inner(x, u)) ** 0.5, abs=1e-15)


def test_the_canonical_gradient_is_no_projection():
    manifold = RestrictedStiefel(gaussian(12, 3), metric="canonical")
    x, u, _ = setting(manifold, 12, 4)
    twice = manifold.egrad2rgrad(x, u)
    torch.testing.assert_close(twice - u, x @ (x.mT @ u), rtol=0, atol=1e-15)  # the rotation counted double


@metrics
def test_default_retractions_are_second_order_for_their_metric(metric):
    rule = RestrictedStiefel(metric=metric).retraction
    assert (rule.name, rule.order[metric]) == ({"euclidean": "polar", "canonical": "cayley"}[metric], 2)


@metrics
@pytest.mark.parametrize("transport", ["projection", "differentiated", "isometric"])
def test_steps_along_every_transport_descend(metric, transport):
    manifold = RestrictedStiefel(gaussian(20, 5), metric=metric, transport=transport)
    point = geoopt.ManifoldParameter(
        manifold.random(20, 3, generator=torch.Generator().manual_seed(1)), manifold=manifold
    )
    a = gaussian(20, 20, seed=9)
    optimizer = geoopt.optim.RiemannianSGD([point], lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((a @ point) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert max(manifold.constraint_error(point)) < 1e-13  # float64, a few roundings


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "hyperbolic"}, "metric is one of euclidean, canonical, got 'hyperbolic'"),
        ({"transport": "magic"}, "transport is one of projection, differentiated, isometric, parallel, got 'magic'"),
        ({"transport": "isometric", "retraction": "qr"}, r"needs a retraction that has one \(cayley\), got 'qr'"),
        ({"transport": "parallel"}, "needs metric='canonical'"),
        ({"transport": "parallel", "metric": "canonical", "retraction": "polar"}, "got 'canonical' and 'polar'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, match):
    unchecked = RestrictedStiefel.__init__.__wrapped__  # the tests' type checker would speak first
    with pytest.raises(ValueError, match=match):
        unchecked(RestrictedStiefel.__new__(RestrictedStiefel), None, **options)


@complements
def test_geodesics_equal_their_textbook_forms(k):
    canonical, euclidean = (RestrictedStiefel(gaussian(12, k), metric=m) for m in ("canonical", "euclidean"))
    x, u, _ = setting(canonical, 5, 12, 4, length=2.0)
    a, eye = x.mT @ u, torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
    b = u - x @ a
    dense = torch.matrix_exp(x @ a @ x.mT + b @ x.mT - x @ b.mT) @ x  # the rotation that u generates, n × n
    # edelman1998geometry, section 2.2.2.
    generator = torch.cat([torch.cat([a, -u.mT @ u], dim=-1), torch.cat([eye, a], dim=-1)], dim=-2)
    edelman = torch.cat([x, u], dim=-1) @ torch.matrix_exp(generator)[..., :4] @ torch.matrix_exp(-a)
    # Thirty float64 products at norms of 2.
    torch.testing.assert_close(canonical.expmap(x, u), dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(euclidean.expmap(x, u), edelman, rtol=0, atol=1e-13)
