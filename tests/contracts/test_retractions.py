"""Laws that every registered retraction obeys; a new one is tested by being registered."""

import copy
import pickle

import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel, check_retraction, register_retraction
from manifold_cl.geometry.retractions import FunctionRetraction, as_retraction

names = pytest.mark.parametrize("name", sorted(RETRACTIONS))


@names
@pytest.mark.parametrize(("n", "p", "k"), [(20, 4, 5), (30, 1, 0), (12, 3, 9), (9, 8, 1)])
def test_a_registered_retraction_keeps_every_promise_it_declares(name, n, p, k):
    assert check_retraction(name, n=n, p=p, k=k).failures() == ()


def test_the_check_sees_a_map_that_moves_twice_as_far():
    report = check_retraction(lambda x, u: torch.linalg.qr(x + 2 * u)[0])
    assert any("first-order slope" in said for said in report.failures())


def test_the_check_sees_an_order_that_is_declared_too_high():
    qr = RETRACTIONS["qr"]
    proud = FunctionRetraction(qr, name="proud", order={"euclidean": 2, "canonical": 1}, self_correcting=True)
    assert check_retraction(proud).failures() == (
        f"order is {check_retraction(proud).geodesic_slope - 1:.2f}, declared 2",
    )


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


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"unknown retraction 'poler', did you mean polar\?"):
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
    assert check_retraction(wrapped).failures() == ()
