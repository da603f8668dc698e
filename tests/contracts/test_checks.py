"""The verification kit itself: right things pass, every known wrong thing fails, and both can be read."""

import dataclasses
import math
import subprocess
import sys
import textwrap

import geoopt
import matplotlib.pyplot as plt
import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel, check_retraction
from manifold_cl.geometry import check_gradient, check_hessian, check_projection, check_transport
from manifold_cl.geometry.checks import measure
from manifold_cl.geometry.figures import plot_report
from manifold_cl.geometry.retractions import FunctionRetraction
from manifold_cl.geometry.testing import ManifoldContract, RetractionContract, quartic
from manifold_cl.linalg import sym

SIZE = (14, 4)
metrics = pytest.mark.parametrize("metric", ["euclidean", "canonical"])


def space(k=3, **options):
    basis = torch.randn(SIZE[0], k, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return RestrictedStiefel(basis, **options)


def failing(report):
    return {law.name for law in report.laws() if not law.holds}


# -- right things pass ------------------------------------------------------------------------------


class TestPolar(RetractionContract):
    retraction = "polar"
    sizes = ((16, 3, 4), (12, 4, 8))


class TestABareFunction(RetractionContract):
    retraction = staticmethod(lambda x, u: qr_of(x + u))
    sizes = ((16, 3, 4),)


def qr_of(y):
    q, r = torch.linalg.qr(y)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


class TestEuclidean(ManifoldContract):
    manifold = space()
    size = SIZE


class TestCanonical(ManifoldContract):
    manifold = space(metric="canonical")
    size = SIZE


class TestDifferentiated(ManifoldContract):
    manifold = space(transport="differentiated")
    size = SIZE


class TestIsometric(ManifoldContract):
    manifold = space(metric="canonical", transport="isometric")
    size = SIZE


class TestParallel(ManifoldContract):
    manifold = space(k=0, metric="canonical", transport="parallel")
    size = SIZE


class TestSquare(ManifoldContract):
    manifold = space(k=10)
    size = SIZE


# -- wrong things fail ------------------------------------------------------------------------------


def doubled(x, u):
    return RETRACTIONS["polar"](x, 2 * u)


def wen_yin(x, u):
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    w = u @ x.mT - x @ u.mT
    return torch.linalg.solve(eye - w / 2, (eye + w / 2) @ x)


@pytest.mark.parametrize("wrong", [doubled, wen_yin])
def test_maps_that_stay_on_the_manifold_but_go_too_far_are_no_retractions(wrong):
    report = check_retraction(wrong)
    assert failing(report) == {"first-order slope", "slope to the geodesic"}
    assert report.first_order_slope == pytest.approx(1, abs=0.05)
    assert report.orthonormality < 1e-13  # a check of the constraint alone would let them pass


def test_an_order_that_was_made_up_is_found_out():
    boast = FunctionRetraction(RETRACTIONS["qr"], name="boast", order={"euclidean": 2})
    assert failing(check_retraction(boast)) == {"slope to the geodesic"}


def test_a_map_that_leaves_the_span_is_caught_in_the_protected_subspace():
    def leaning(x, u):
        return qr_of(x + u + 1e-3 * torch.linalg.matrix_norm(u, keepdim=True) ** 3)

    assert "the result reaches into F by" in failing(check_retraction(leaning))


@pytest.mark.slow
def test_a_function_that_autograd_cannot_follow_has_no_gradient_to_check():
    def detached(x, u):
        return RETRACTIONS["polar"](x, u.detach())

    def in_place(x, u):
        y = u.exp()
        value = y.sum() * 0 + y  # exp needs its result for the backward pass
        y.zero_()
        return RETRACTIONS["polar"](x, u + 0 * value)

    assert check_retraction(detached).gradient is None
    assert check_retraction(in_place).gradient is None


def test_a_gradient_that_is_wrong_only_at_zero_is_caught():
    def by_decomposition(x, u):  # right everywhere but where singular values agree
        left, _, right = torch.linalg.svd(x + u, full_matrices=False)
        return left @ right

    assert failing(check_retraction(by_decomposition)) == {"the gradient is off by"}


class CanonicalGradientAsProjection(RestrictedStiefel):
    def proju(self, x, u):
        u = self._project_out(u)
        return u - x @ (u.mT @ x)


@pytest.mark.parametrize("wrong", [CanonicalGradientAsProjection(), geoopt.CanonicalStiefel()])
def test_the_canonical_gradient_is_not_taken_for_a_projection(wrong):
    assert "projecting twice differs from once by" in failing(check_projection(wrong, *SIZE))


def test_the_check_of_projections_takes_any_manifold_and_passes_right_ones():
    report = check_projection(geoopt.EuclideanStiefel(), *SIZE)
    assert failing(report) == set()
    assert "6 of 6 laws hold" in str(report)


class NoProjection(RestrictedStiefel):
    def retr_transp(self, x, u, v):
        return self.retr(x, u), v


class Constant(RestrictedStiefel):
    def retr_transp(self, x, u, v):
        y = self.retr(x, u)
        return y, self.proju(y, torch.ones_like(v))


class CalledReversible(RestrictedStiefel):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.reversible = True


@pytest.mark.parametrize(
    ("wrong", "laws"),
    [
        (NoProjection(), {"carried vectors leave the tangent space by"}),
        (Constant(), {"a zero step changes vectors by", "linearity is off by"}),
        (CalledReversible(), {"inner products change by", "the way back misses by"}),
    ],
)
def test_wrong_transports_fail_by_name(wrong, laws):
    assert failing(check_transport(wrong, *SIZE)) == laws


def test_a_differentiated_transport_that_is_only_a_projection_fails():
    manifold = space(transport="differentiated")
    manifold.retr_transp = lambda x, u, v: RestrictedStiefel.retr_transp(space(), x, u, v)
    assert failing(check_transport(manifold, *SIZE)) == {"it differs from the retraction's derivative by"}


class EuclideanGradient(RestrictedStiefel):
    def egrad2rgrad(self, x, u):
        return u


class CanonicalGradientOfTheEuclideanMetric(RestrictedStiefel):
    def egrad2rgrad(self, x, u):
        return u - x @ (u.mT @ x)


def test_wrong_gradients_fail():
    assert failing(check_gradient(EuclideanGradient(), quartic, size=SIZE)) == {
        "the gradient leaves the tangent space by"
    }
    assert failing(check_gradient(CanonicalGradientOfTheEuclideanMetric(), quartic, size=SIZE)) == {
        "slope of the linear model's error"
    }


@pytest.mark.slow
@metrics
def test_the_projected_euclidean_hessian_is_no_riemannian_hessian(metric):
    manifold = space(metric=metric)

    def hessian(x, u):
        return manifold.proju(x, torch.func.jvp(torch.func.grad(quartic), (x,), (u,))[1])

    assert "slope of the quadratic model's error" in failing(
        check_hessian(manifold, quartic, size=SIZE, hessian=hessian)
    )


def test_the_hessian_of_the_other_metric_fails():
    euclidean, canonical = space(), space(metric="canonical")

    def hessian(x, u):
        gradient, second = torch.func.jvp(torch.func.grad(quartic), (x,), (u,))
        return euclidean.ehess2rhess(x, gradient, second, u)

    laws = failing(check_hessian(canonical, quartic, size=SIZE, hessian=hessian))
    assert {"symmetry is off by", "slope of the quadratic model's error"} <= laws


# -- and both can be read ---------------------------------------------------------------------------


def test_reports_are_frozen_and_print_every_law_with_its_number():
    report = check_retraction("cayley", "canonical")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.at_zero = 0.0
    lines = str(report).splitlines()
    assert lines[0] == "cayley: 13 of 13 laws hold"
    assert len(lines) == 14
    assert all(line.startswith("  ok    ") for line in lines[1:])
    assert "FAIL" in str(check_retraction(wen_yin))
    assert report.passed
    assert 0 < report.seconds < 10


COMPILED = """
import torch
from manifold_cl import RETRACTIONS, check_retraction

def reading(x, u):
    return RETRACTIONS["qr" if float(u.norm()) > 100 else "polar"](x, u)

assert check_retraction("cayley", compiled=True).graph_breaks == 0
report = check_retraction(reading, compiled=True)
assert report.graph_breaks >= 1, report
assert [law.name for law in report.laws() if not law.holds] == ["breaks under torch.compile"], report
"""


@pytest.mark.slow
def test_graph_breaks_are_counted():
    # In a process of its own: the tests' shape checker wraps functions in a way that dynamo cannot trace.
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True, capture_output=True)


@pytest.mark.parametrize("retraction", ["qr", wen_yin], ids=["right", "wrong"])
def test_reports_of_retractions_draw_their_slopes(retraction):
    report = check_retraction(retraction, steps=10)
    axes = plot_report(report)
    assert len(axes.lines) == 2
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert ("fails 2 of" in axes.get_title()) is not report.passed
    plt.close(axes.figure)


def test_residual_reports_draw_a_bar_for_each_law_into_given_axes():
    figure, axes = plt.subplots()
    report = check_projection(CanonicalGradientAsProjection(), *SIZE)
    assert plot_report(report, axes) is axes
    assert len(axes.patches) == 6
    assert "fails 2 of 6 laws" in axes.get_title()
    plt.close(figure)


@pytest.mark.parametrize("check", [check_gradient, check_hessian])
def test_derivative_checks_say_where_and_of_what(check):
    with pytest.raises(ValueError, match=r"give a point x, or size=\(n, p\)"):
        check(space(), quartic)
    with pytest.raises(ValueError, match=r"differentiable 0-d tensor, got shape \(14, 4\)"):
        check(space(), lambda x: x * x, size=SIZE)
    x = space().random(*SIZE, generator=torch.Generator().manual_seed(8))
    assert check(space(), lambda y: y.sum(), x).passed  # linear: its second derivative is not even connected


def test_slopes_of_known_powers_are_known():
    assert measure.slope(lambda t: 3 * t**2.5) == pytest.approx(2.5, abs=1e-12)  # exact in exact arithmetic
    assert measure.slope(lambda t: 0.0) == math.inf
    assert float(measure.finite_difference(lambda t: torch.tensor(t, dtype=torch.float64).exp())) == pytest.approx(
        1, abs=1e-12
    )  # h⁴/30 at h = 1e-3, and rounding over h


@pytest.mark.slow
def test_an_outsiders_test_module_fails_where_the_retraction_does(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        textwrap.dedent("""
        import torch
        from manifold_cl.geometry.testing import RetractionContract

        def unhalved(x, u):
            eye = torch.eye(x.shape[-2], dtype=x.dtype)
            w = u @ x.mT - x @ u.mT
            return torch.linalg.solve(eye - w / 2, (eye + w / 2) @ x)

        class TestWrong(RetractionContract):
            retraction = staticmethod(unhalved)
            sizes = ((12, 2, 3),)

        class TestRight(RetractionContract):
            retraction = "cayley"
            sizes = ((12, 2, 3),)
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "2 failed, 2 passed" in done.stdout
    assert "first-order slope" in done.stdout
    assert "TestWrong" in done.stdout
    assert "FAILED test_mine.py::TestRight" not in done.stdout


def test_the_projection_of_the_euclidean_metric_is_the_formula():
    x = space().random(*SIZE, generator=torch.Generator().manual_seed(1)).as_subclass(torch.Tensor)
    z = torch.randn(*SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    free = z - space().complement @ (space().complement.mT @ z)
    torch.testing.assert_close(space().proju(x, z), free - x @ sym(x.mT @ free), rtol=0, atol=1e-15)  # a rounding
