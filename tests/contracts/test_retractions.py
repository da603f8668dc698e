"""Laws that every registered retraction obeys; a new one is tested by being registered."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel, check_retraction, register_retraction
from manifold_cl.geometry.checks.measure import finite_difference
from manifold_cl.geometry.retractions import FunctionRetraction, as_retraction

names = pytest.mark.parametrize("name", sorted(RETRACTIONS))


metrics = pytest.mark.parametrize("metric", ["euclidean", "canonical"])


# Both metrics at one size; at the others only laws without a metric differ. Drift, the slow part, at two sizes.
SIZES = [("euclidean", 20, 4, 1, 100), ("canonical", 20, 4, 1, 20), ("euclidean", 20, 4, 0, 20)]
SIZES += [("canonical", 12, 4, 8, 100), ("euclidean", 12, 1, 3, 20), ("canonical", 9, 8, 0, 20)]


@names
@pytest.mark.parametrize(("metric", "n", "p", "k", "steps"), SIZES)
def test_a_registered_retraction_keeps_every_promise_it_declares(name, metric, n, p, k, steps):
    report = check_retraction(name, metric, n=n, p=p, k=k, steps=steps)
    assert report.failures() == ()
    assert report.first_order_slope == pytest.approx(2, abs=0.05)  # steps of 1e-2 leave a part in a hundred
    if n - k > p > 1:  # elsewhere the metrics share their geodesics, and a symmetry can raise the order
        assert report.geodesic_slope == pytest.approx(report.declared_order + 1, abs=0.05)
    if name != "iterative_cayley":
        assert report.drift_float32 <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(RETRACTIONS) - {"iterative_cayley"}))
def test_many_float32_steps_stay_on_the_manifold(name):
    draw = torch.Generator().manual_seed(0)
    manifold = RestrictedStiefel(torch.randn(64, 16, generator=draw), retraction=name)
    x = manifold.random(64, 8, generator=draw).as_subclass(torch.Tensor)
    for _ in range(2000):  # benchmarks/soak.py takes ten thousand
        u = manifold.proju(x, torch.randn(64, 8, generator=draw))
        x = manifold.retr(x, 0.3 * u / u.norm())
    assert max(manifold.constraint_error(x)) <= 1e-6  # ten float32 roundings of 1e-7: nothing accumulates


@names
@metrics
@pytest.mark.parametrize("normal", [0.0, -1.0, 1.0, -5.0, 50.0, -300.0])
@pytest.mark.parametrize("verb", ["retr", "expmap", "retr_transp"])
def test_one_step_removes_a_leak_whatever_the_normal_part_of_the_displacement(name, metric, normal, verb):
    draw = torch.Generator().manual_seed(8)
    manifold = RestrictedStiefel(torch.randn(40, 12, generator=draw), retraction=name, metric=metric)
    x = manifold.random(40, 5, generator=draw).as_subclass(torch.Tensor)
    drifted = x + 1e-3 * manifold.complement @ torch.randn(12, 5, generator=draw)
    u = manifold.proju(x, torch.randn(40, 5, generator=draw))
    inside = manifold.complement @ torch.randn(12, 5, generator=draw)  # the displacement reaches into F too
    skewed = torch.randn(5, 5, generator=draw)
    turn = x @ (skewed - skewed.T)
    y = getattr(manifold, verb)(drifted, u + turn + inside + normal * x, *([u] if verb == "retr_transp" else []))
    y, *carried = y if verb == "retr_transp" else (y,)
    assert max(manifold.constraint_error(y)) <= 2e-6  # the documented bound; the normal part first, the projection last
    for v in carried:
        assert float((manifold.complement.T @ v).abs().max()) <= 2e-6 * float(v.norm())


@names
@metrics
def test_batches_of_batches_and_empty_batches_work(name, metric):
    draw = torch.Generator().manual_seed(1)
    manifold = RestrictedStiefel(torch.randn(9, 2, dtype=torch.float64, generator=draw), retraction=name, metric=metric)
    x = manifold.random(2, 3, 9, 2, generator=draw).as_subclass(torch.Tensor)
    u = manifold.proju(x, torch.randn(2, 3, 9, 2, dtype=torch.float64, generator=draw))
    # The same arithmetic in another order.
    torch.testing.assert_close(manifold.retr(x, u)[1, 2], manifold.retr(x[1, 2], u[1, 2]), rtol=0, atol=1e-13)
    assert manifold.retr(x[:0], u[:0]).shape == (0, 3, 9, 2)


def test_the_check_sees_a_wrong_inverse_differential_and_transport():
    class Wrong(type(RETRACTIONS["cayley"])):
        def inverse(self, x, y):
            return super().inverse(x, y) + 1e-6 * (x - y)

        def differential(self, x, u, v):
            return v

        def transport(self, x, u, v):
            return super().differential(x, u, v)  # keeps no lengths

    said = " ".join(check_retraction(Wrong(), "canonical").failures())
    for word in ("the inverse misses by", "the differential is off by", "the transport is off by"):
        assert word in said


def test_the_check_sees_wen_and_yins_map_fed_with_a_tangent_vector():
    def wen_yin(x, u):
        eye = torch.eye(x.shape[-2], dtype=x.dtype)
        w = u @ x.mT - x @ u.mT
        return torch.linalg.solve(eye - w / 2, (eye + w / 2) @ x)

    assert any("first-order slope: 1.0" in said for said in check_retraction(wen_yin).failures())


def test_the_metric_of_a_check_must_be_one_that_the_retraction_declares():
    rule = FunctionRetraction(RETRACTIONS["qr"], name="half", order={"euclidean": 1})
    with pytest.raises(ValueError, match="'half' declares its order for euclidean, not 'canonical'"):
        check_retraction(rule, "canonical")


def test_cheap_forms_equal_their_slow_twins():
    draw = torch.Generator().manual_seed(2)
    manifold = RestrictedStiefel(torch.randn(18, 4, dtype=torch.float64, generator=draw))
    x = manifold.random(5, 18, 4, generator=draw).as_subclass(torch.Tensor)
    u = manifold.proju(x, torch.randn(5, 18, 4, dtype=torch.float64, generator=draw))
    eye = torch.eye(18, dtype=torch.float64)
    half = u - x @ (x.mT @ u) / 2
    w = half @ x.mT - x @ half.mT
    dense = torch.linalg.solve(eye - w / 2, (eye + w / 2) @ x)
    passes = RETRACTIONS["iterative_cayley"](x, 0.05 * u)
    # |u| is 7: a condition of 10 on 16 digits.
    for name, twin in [("cayley", dense), ("polar", RETRACTIONS["polar_svd"](x, u)), ("cholesky_qr", qr_of(x + u))]:
        torch.testing.assert_close(RETRACTIONS[name](x, u), twin, rtol=0, atol=1e-13)
    # |W/2| is below 0.2 at this step, and the seventh power of it remains after the Euler step and five passes.
    torch.testing.assert_close(passes, RETRACTIONS["cayley"](x, 0.05 * u), rtol=0, atol=2e-5)


def qr_of(y):
    q, r = torch.linalg.qr(y)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


@names
def test_gradients_are_right_away_from_zero(name):
    draw = torch.Generator().manual_seed(6)
    x = RestrictedStiefel().random(6, 2, dtype=torch.float64, generator=draw).as_subclass(torch.Tensor)
    u = RestrictedStiefel().proju(x, torch.randn(6, 2, dtype=torch.float64, generator=draw)).requires_grad_()
    # Away from tangent vectors some of the forms are no retractions: only tangent directions are compared.
    tangent = RestrictedStiefel().proju(x, torch.randn(6, 2, dtype=torch.float64, generator=draw))
    weights = torch.randn(6, 2, dtype=torch.float64, generator=draw)
    (gradient,) = torch.autograd.grad((RETRACTIONS[name](x, u) * weights).sum(), u)
    difference = finite_difference(lambda t: (RETRACTIONS[name](x, u.detach() + t * tangent) * weights).sum())
    assert abs(float((gradient * tangent).sum() - difference)) < 1e-8  # differences of fourth order at a step of 1e-3


@names
def test_nan_passes_through_and_stays_in_its_member_of_the_batch(name):
    draw = torch.Generator().manual_seed(7)
    manifold = RestrictedStiefel(retraction=name)
    x = manifold.random(2, 6, 2, dtype=torch.float64, generator=draw).as_subclass(torch.Tensor)
    u = manifold.proju(x, torch.randn(2, 6, 2, dtype=torch.float64, generator=draw))
    u[1, 0, 0] = torch.nan
    y = manifold.retr(x, u)
    assert bool(y[1].isnan().any())
    assert bool(y[0].isfinite().all())


COMPILING = """
import torch
from manifold_cl import RETRACTIONS, RestrictedStiefel
draw = torch.Generator().manual_seed(0)
basis = torch.randn(12, 3, dtype=torch.float64, generator=draw)
for name in sorted(set(RETRACTIONS) - {"polar_svd"}):
    manifold = RestrictedStiefel(basis, retraction=name, metric="canonical")
    x = manifold.random(2, 12, 4, generator=draw).as_subclass(torch.Tensor)
    u = 0.1 * torch.randn(2, 12, 4, dtype=torch.float64, generator=draw)
    for verb in (manifold.retr, manifold.egrad2rgrad, manifold.expmap):
        torch._dynamo.reset()
        compiled = torch.compile(verb, backend="eager", fullgraph=True)
        # Compiled iterations run longer, to the same limit.
        torch.testing.assert_close(compiled(x, u), verb(x, u), rtol=0, atol=1e-14)
"""


@pytest.mark.slow
def test_retractions_compile_without_a_graph_break():
    # In a process of its own: the tests' shape checker wraps functions in a way that dynamo cannot trace.
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILING], check=True)


def test_the_check_sees_a_map_that_moves_twice_as_far():
    report = check_retraction(lambda x, u: torch.linalg.qr(x + 2 * u)[0])
    assert any("first-order slope" in said for said in report.failures())


def test_the_check_sees_an_order_that_is_declared_too_high():
    qr = RETRACTIONS["qr"]
    proud = FunctionRetraction(qr, name="proud", order={"euclidean": 2, "canonical": 1}, self_correcting=True)
    assert check_retraction(proud).failures() == ("slope to the geodesic: 2.00, wanted ≥ 2.9",)


@names
def test_a_retraction_is_a_value(name):
    rule = RETRACTIONS[name]
    assert copy.deepcopy(rule) == rule == pickle.loads(pickle.dumps(rule))
    assert hash(copy.deepcopy(rule)) == hash(rule)
    assert name in repr(rule)


@names
def test_a_retraction_can_be_differentiated_at_equal_singular_values(name):
    draw = torch.Generator().manual_seed(3)
    manifold = RestrictedStiefel(retraction=name)
    x = manifold.random(7, 3, dtype=torch.float64, generator=draw).as_subclass(torch.Tensor)
    # u = 0 makes all singular values of x + u equal, where an SVD has no gradient.
    u = torch.zeros_like(x).requires_grad_()
    weights = torch.randn(7, 3, dtype=torch.float64, generator=draw)
    (gradient,) = torch.autograd.grad((RETRACTIONS[name](x, u) * weights).sum(), u)
    tangent = manifold.proju(x, torch.randn(7, 3, dtype=torch.float64, generator=draw))
    # dR(0) is the identity on tangent vectors; 1e-12 is float64 rounding through the iteration.
    assert abs(float((gradient * tangent).sum() - (weights * tangent).sum())) < 1e-12


@names
def test_a_large_step_still_ends_on_the_manifold(name):
    draw = torch.Generator().manual_seed(4)
    manifold = RestrictedStiefel(torch.randn(25, 6, dtype=torch.float64, generator=draw), retraction=name)
    x = manifold.random(25, 5, generator=draw)
    u = 1e3 * manifold.proju(x, torch.randn(25, 5, dtype=torch.float64, generator=draw))
    # |u| of 1e4 squared costs the Gram matrix 8 of its 16 digits.
    assert max(manifold.constraint_error(manifold.retr(x, u))) < 1e-7


@names
@pytest.mark.parametrize("length", [3.0, 30.0, 200.0])
def test_one_large_singular_value_costs_float32_no_digit(name, length):
    draw = torch.Generator().manual_seed(5)
    manifold = RestrictedStiefel(torch.randn(60, 9, generator=draw), retraction=name)
    x = manifold.random(60, 6, generator=draw).as_subclass(torch.Tensor)
    column = manifold.proju(x, torch.randn(60, 6, generator=draw) * torch.eye(6)[0])
    u = length * column / column.norm()
    assert (
        max(manifold.constraint_error(manifold.retr(x, u))) <= 2e-6
    )  # the documented bound; the Gram matrix alone leaves 1e-3


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"unknown retraction 'poler', did you mean polar or polar_svd\?"):
        RestrictedStiefel(retraction="poler")


def test_something_that_cannot_be_called_is_refused():
    unchecked = as_retraction.__wrapped__  # the tests' type checker would speak first
    with pytest.raises(TypeError, match="a name, a Retraction or a function"):
        unchecked(3)


def test_a_taken_name_and_an_incomplete_class_are_refused():
    with pytest.raises(ValueError, match="'polar' is registered already"):
        register_retraction(type(RETRACTIONS["polar"]))
    with pytest.raises(TypeError, match="needs name, order"):
        register_retraction(object)


def test_a_bare_function_is_wrapped_as_first_order():
    def by_svd(x, u):
        left, _, right = torch.linalg.svd(x + u, full_matrices=False)
        return left @ right

    wrapped = as_retraction(by_svd)
    assert wrapped.name == "by_svd"
    assert wrapped.order == {"euclidean": 1, "canonical": 1}
    # Its gradient fails where singular values agree; all else holds.
    assert check_retraction(wrapped).failures() == ("the gradient is off by: nan, wanted < 1e-09",)
