"""Families of retractions: Padé approximants, Neumann series, a fixed Newton-Schulz schedule, the quasi-geodesic."""

import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel, check_retraction
from manifold_cl.geometry import BetaMetric
from manifold_cl.geometry.long_steps import LONG
from manifold_cl.geometry.retractions import CayleyNeumann, NewtonSchulz, Pade, QuasiGeodesic, as_retraction
from manifold_cl.linalg import gram_error, matrix_exp


def setting(n=20, p=4, k=5, *, batch=5, length=1.0, dtype=torch.float64):
    """A manifold, points, and tangent vectors of the given Frobenius length."""
    draw = torch.Generator().manual_seed(0)
    manifold = RestrictedStiefel(torch.randn(n, k, dtype=dtype, generator=draw))
    x = manifold.random(batch, n, p, dtype=dtype, generator=draw).as_subclass(torch.Tensor)
    u = manifold.proju(x, torch.randn(batch, n, p, dtype=dtype, generator=draw))
    return manifold, x, length * u / torch.linalg.matrix_norm(u, keepdim=True)


def generator(x, u):
    """The skew n × n matrix W with W x = u, of the canonical metric."""
    half = u - x @ (x.mT @ u) / 2
    return half @ x.mT - x @ half.mT


def test_a_member_of_a_family_is_a_retraction_like_any_other():
    for rule, name in [
        (Pade(2), "pade_2"),
        (Pade(3), "pade_3"),
        (CayleyNeumann(4), "cayley_neumann_4"),
        (NewtonSchulz(), "newton_schulz"),
    ]:
        assert as_retraction(rule) == RETRACTIONS[name]
    assert RestrictedStiefel(retraction=CayleyNeumann(3)).retraction.name == "cayley_neumann_3"
    assert NewtonSchulz(1.0).name == "newton_schulz_1.0"


@pytest.mark.parametrize(
    ("rule", "order"),
    [(CayleyNeumann(1), 1), (CayleyNeumann(2), 2), (CayleyNeumann(5), 2), (Pade(1), 2), (NewtonSchulz(0.5), 1)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_members_have_their_declared_order_too(rule, order):
    report = check_retraction(rule, "canonical", steps=50)
    assert report.failures() == ()
    assert rule.order["canonical"] == order
    assert report.geodesic_slope == pytest.approx(order + 1, abs=0.05)


@pytest.mark.parametrize("length", [0.1, 1.0, 7.0])
def test_pade_equals_its_dense_definition(length):
    _, x, u = setting(length=length)
    w, eye = generator(x, u), torch.eye(20, dtype=torch.float64)
    square = w @ w
    terms = {
        1: (eye, w / 2),
        2: (eye + square / 12, w / 2),
        3: (eye + square / 10, w / 2 + w @ square / 120),
    }
    for degree, (even, odd) in terms.items():
        dense = torch.linalg.solve(even - odd, (even + odd) @ x)
        torch.testing.assert_close(Pade(degree)(x, u), dense, rtol=0, atol=2e-13)  # conditions up to 30 on 16 digits
    # The same point as Cayley's p × p form.
    torch.testing.assert_close(Pade(1)(x, u), RETRACTIONS["cayley"](x, u), rtol=0, atol=2e-13)


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize(("length", "bound"), [(10.0, 1e-13), (1e2, 1e-11), (1e4, 1e-5)])
def test_a_long_pade_step_is_nearly_orthonormal_before_the_manifold_normalises_it(degree, length, bound):
    manifold, x, _ = setting()
    draw = torch.Generator().manual_seed(3)
    left, right = (torch.randn(5, *size, dtype=torch.float64, generator=draw) for size in ((20, 1), (1, 4)))
    u = manifold.proju(x, left @ right)  # of rank one before the projection: the worst case
    u = length * u / torch.linalg.matrix_norm(u, keepdim=True)
    # The condition of the quadratic factor is |W|²/12. In one system of degree 3 the last error is 4e-3.
    assert float(gram_error(Pade(degree)(x, u)).abs().max()) < bound


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
def test_a_neumann_series_is_the_cayley_transform_up_to_its_last_power(terms):
    _, x, u = setting(length=0.6)  # |W|_F is at most 0.85: not shortened
    q, eye = generator(x, u) / 2, torch.eye(20, dtype=torch.float64)
    y = CayleyNeumann(terms)(x, u)
    power = torch.linalg.matrix_power(q, terms + 1)
    expected = torch.linalg.solve(eye - q, (eye + q) @ (x - power @ x))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)  # twenty roundings
    # xᵀx − I is −2 xᵀQᵏ⁺¹x, which vanishes for odd powers, up to the square of Qᵏ⁺¹.
    leading = float(torch.linalg.matrix_norm(power @ x, 2).max())
    error = float(gram_error(y).abs().max())
    assert error < 1.01 * (leading**2 if terms % 2 == 0 else 2 * leading + leading**2)
    assert error > 0


def test_a_step_beyond_the_reach_of_the_series_is_shortened():
    _, x, u = setting(length=5.0)
    size = torch.linalg.matrix_norm(generator(x, u), keepdim=True)
    rule = CayleyNeumann(4)
    torch.testing.assert_close(rule(x, u), rule(x, u / size), rtol=0, atol=1e-14)
    assert float(gram_error(rule(x, u)).abs().max()) < 2 * 0.5**10  # |Q|_F is 1/2 then


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("longest", [0.3, 1.0, 4.0, LONG])
def test_a_fixed_schedule_is_the_polar_factor_up_to_its_longest_step(longest, dtype):
    rule = NewtonSchulz(longest)
    bound = 1e-6 if dtype == torch.float32 else 1e-14  # ten roundings; 2e-6 is documented
    for share in (1e-3, 0.3, 0.999):
        _, x, u = setting(length=share * longest, dtype=dtype)
        assert rule.error_bound(share * longest, dtype) < torch.finfo(dtype).eps
        assert float(gram_error(rule(x, u).double()).abs().max()) < bound
        torch.testing.assert_close(rule(x, u), RETRACTIONS["polar_svd"](x, u), rtol=0, atol=8 * bound)


@pytest.mark.parametrize("longest", [0.3, 1.0, LONG])
def test_beyond_its_longest_step_a_fixed_schedule_is_off_by_at_most_its_bound(longest):
    rule = NewtonSchulz(longest)
    manifold, x, _ = setting()
    draw = torch.Generator().manual_seed(1)
    # Of rank one: the step on which the bound is attained, up to the norm it is made for.
    column = manifold.proju(x, torch.randn(5, 20, 4, dtype=torch.float64, generator=draw) * torch.eye(4)[0])
    column = column / torch.linalg.matrix_norm(column, keepdim=True)
    polar = RestrictedStiefel(manifold.complement, retraction="polar_svd")
    through = RestrictedStiefel(manifold.complement, retraction=rule)
    for factor in (2.0, 5.0, 30.0):
        length = factor * longest
        y = rule(x, length * column)
        error = float(torch.linalg.matrix_norm(gram_error(y), 2).max())
        bound = rule.error_bound(length, torch.float64)
        assert error <= bound + 1e-13  # rounding
        assert bound < 1
        if bound > 1e-6:
            assert error > 0.1 * bound
        # The polar factor is kept, and the manifold completes it.
        w, expected = through.retr(x, length * column), polar.retr(x, length * column)
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-11)  # conditions up to 240 squared
        assert max(through.constraint_error(w)) < 1e-14


def test_the_table_of_schedules_in_the_docs():
    rows = {0.3: (3, 4, 2e-15, 4e-8, 1e-3), 1.0: (4, 5, 3e-8, 3e-3, 2e-1), LONG: (9, 10, 0.0, 3e-8, 7e-3)}
    for longest, (single, double, *errors) in rows.items():
        rule = NewtonSchulz(longest)
        assert (rule.passes(torch.float32), rule.passes(torch.float64)) == (single, double)
        # To the one digit that the table shows.
        found = [rule.error_bound(factor * longest) for factor in (2, 4, 8)]
        assert [float(f"{error:.0e}") if error > 1e-16 else 0.0 for error in found] == errors


def test_a_fixed_schedule_reads_no_value():
    x = torch.empty(64, 8, device="meta")
    assert NewtonSchulz(1.0)(x, x).shape == (64, 8)
    broken = torch.eye(64, 8)
    # A value that is read would raise under this mode.
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        assert NewtonSchulz()(broken, torch.zeros(64, 8)).shape == (64, 8)


@pytest.mark.parametrize("length", [1e-9, 1e-3, 1.0, 1.5])
def test_a_quasi_geodesic_rotates_outwards_then_inside(length):
    _, x, u = setting(length=length)
    a = x.mT @ u
    b = u - x @ a
    eye = torch.eye(20, dtype=torch.float64)
    outwards = matrix_exp(b @ x.mT - x @ b.mT)  # n × n, a geodesic of subspaces
    inside = x @ matrix_exp(a) @ x.mT + eye - x @ x.mT
    y = QuasiGeodesic()(x, u)
    torch.testing.assert_close(y, outwards @ inside @ x, rtol=0, atol=1e-14)  # twenty products
    torch.testing.assert_close(QuasiGeodesic().inverse(x, y), u, rtol=0, atol=1e-14 + 1e-14 * length)


def test_the_inverse_of_a_quasi_geodesic_reaches_up_to_right_angles():
    manifold, x, u = setting(batch=1)
    b = u - x @ (x.mT @ u)
    for largest in (1.5, 1.57):
        step = largest * b / torch.linalg.matrix_norm(b, 2)
        torch.testing.assert_close(QuasiGeodesic().inverse(x, QuasiGeodesic()(x, step)), step, rtol=0, atol=1e-11)
    beyond = 1.7 * b / torch.linalg.matrix_norm(b, 2)
    bent = RestrictedStiefel(manifold.complement, retraction="quasi_geodesic")
    # One eigenvalue of cos(h) is negative: xᵀy then has a reflection as its polar factor, which has no logarithm.
    with pytest.raises(ValueError, match="'quasi_geodesic' does not reach y from x"):
        bent.inverse_retr(x, bent.retr(x, beyond))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Pade(4), "1, 2 or 3, got 4"),
        (lambda: CayleyNeumann(0), r"terms, .* must be at least 1, got 0"),
        (lambda: NewtonSchulz(0.0), r"is a positive number, got 0\.0"),
        (lambda: NewtonSchulz(float("inf")), "is a finite number, got inf"),
    ],
)
def test_parameters_outside_a_family_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_quasi_geodesic_has_constant_speed_and_covariant_acceleration_of_constant_length(beta):
    manifold = RestrictedStiefel(metric=BetaMetric(beta), retraction="quasi_geodesic")
    _, x, u = setting(batch=1)
    speeds, bends = [], []
    for t in (0.0, 0.5, 1.0):
        path = [manifold.retr(x, (t + i * 1e-3) * u) for i in (-2, -1, 0, 1, 2)]
        velocity = (8 * (path[3] - path[1]) - (path[4] - path[0])) / 12e-3
        acceleration = (16 * (path[3] + path[1]) - (path[4] + path[0]) - 30 * path[2]) / 12e-6
        y, v = path[2], manifold.proju(path[2], velocity)
        a = y.mT @ v
        covariant = manifold.proju(y, acceleration) - 2 * (1 - beta) * (v - y @ a) @ a
        speeds.append(float(manifold.norm(y, v)))
        bends.append(float(manifold.norm(y, covariant)))
    assert speeds == pytest.approx([speeds[0]] * 3, abs=1e-10)  # fourth-order differences at a step of 1e-3
    assert bends == pytest.approx([bends[0]] * 3, abs=1e-8)  # rounding of positions over the square of 1e-3
    assert bends[0] > 0.05  # no geodesic
