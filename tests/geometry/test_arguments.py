"""Wrong kinds, dtypes and shapes at every public verb of the geometry: one error that names the argument."""

import re

import jaxtyping
import numpy as np
import pytest
import torch

from manifold_cl.geometry import (
    RETRACTIONS,
    GeneralizedStiefel,
    ProtectedSubspace,
    RestrictedStiefel,
    ScaledStiefel,
    tangent_lmo,
)
from manifold_cl.infeasible import INFEASIBLE_STEPS

N, P, K = 12, 3, 4


@pytest.fixture(autouse=True)
def _as_users_see_it(_checked_shapes):
    """Without the shape checks of the tests, which would come first; the next test has them again."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def basis(n=N):
    return torch.linalg.qr(torch.randn(n, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]


def spaces():
    return {
        "restricted": RestrictedStiefel(basis()),
        "canonical": RestrictedStiefel(basis(), metric="canonical", transport="parallel"),
        "scaled": ScaledStiefel(2.0, basis()),
        "generalized": GeneralizedStiefel(2 * torch.eye(N, dtype=torch.float64), basis()),
    }


VERBS = {
    "proju": ("x", "u"),
    "egrad2rgrad": ("x", "u"),
    "ehess2rhess": ("x", "g", "h", "u"),
    "inner": ("x", "u", "v"),
    "norm": ("x", "u"),
    "component_inner": ("x", "u", "v"),
    "dist": ("x", "y"),
    "logmap": ("x", "y"),
    "inverse_retr": ("x", "y"),
    "retr": ("x", "u"),
    "expmap": ("x", "u"),
    "transp": ("x", "y", "v"),
    "retr_transp": ("x", "u", "v"),
    "expmap_transp": ("x", "u", "v"),
    "transp_follow_retr": ("x", "u", "v"),
    "transp_follow_expmap": ("x", "u", "v"),
    "projx": ("x",),
    "constraint_error": ("x",),
}
UNREAD = {("transp", "x")}
"""The projection at the end does not depend on where the vector came from."""


@pytest.mark.parametrize("name", spaces())
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_the_argument_of_a_wrong_shape(name, verb):
    space = spaces()[name]
    right = space.origin(N, P, dtype=torch.float64).as_subclass(torch.Tensor)
    names = [one for one in VERBS[verb] if (verb, one) not in UNREAD]
    for argument in names:
        # A single column or row, and a 0-d tensor, broadcast: without the check they gave numbers.
        for shape in ((N, P + 1), (N + 1, P), (N, 1), (1, P), (N,), (P, N), ()):
            named = argument
            if argument == names[0] and shape in ((N, P + 1), (N, 1)):  # the shape of a point: the others differ
                named = names[1] if len(names) > 1 else None
            if named is None:
                continue
            tensors = dict.fromkeys(VERBS[verb], right) | {argument: torch.zeros(shape, dtype=torch.float64)}
            given = tuple(tensors[named].shape)
            with pytest.raises(ValueError, match=rf"^{named} has shape {re.escape(str(given))} and must"):
                getattr(space, verb)(*tensors.values())


@pytest.mark.parametrize("name", spaces())
def test_verbs_refuse_other_kinds_and_dtypes_by_name(name):
    space = spaces()[name]
    x = space.origin(N, P, dtype=torch.float64).as_subclass(torch.Tensor)
    for verb, names in VERBS.items():
        with pytest.raises(TypeError, match=f"^{'y' if verb == 'transp' else 'x'} is a tensor .*ndarray"):
            getattr(space, verb)(*(x.numpy() for _ in names))
    for verb in ("proju", "egrad2rgrad", "retr", "expmap", "retr_transp", "expmap_transp"):
        with pytest.raises(TypeError, match=r"u has torch.float32 and x torch.float64: .*u.to\(x.dtype\)"):
            getattr(space, verb)(*(x if one == "x" else x.float() for one in VERBS[verb]))


def test_the_advice_fits_the_fault():
    space, x = RestrictedStiefel(basis()), torch.zeros(N, P, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 12\) and must be .*12 rows as the complement has: pass x.mT"
    ):
        space.projx(x.mT)
    with pytest.raises(ValueError, match=r"u has shape \(3, 12\) and must have the shape of x, \(12, 3\): pass u.mT"):
        space.retr(x, x.mT)
    with pytest.raises(ValueError, match=r"x has shape \(12,\) and must be a matrix \(…, 12, p\): .*\[:, None\]"):
        space.projx(x[:, 0])
    with pytest.raises(ValueError, match=r"x has shape \(7, 3\) and must be \(…, 12, p\).*: \(12, 3\)"):
        space.projx(x[:7])
    with pytest.raises(ValueError, match=r"x has shape \(3, 12\) and must be tall, \(…, n, p\) with p ≤ n: pass x.mT"):
        RestrictedStiefel().projx(x.mT)
    with pytest.raises(ValueError, match=r"u has shape \(5, 12, 3\), a batch \(5,\), but x has shape \(2, 12, 3\)"):
        space.retr(x.expand(2, N, P), x.expand(5, N, P))
    batch = RestrictedStiefel(basis().expand(2, N, K))
    with pytest.raises(
        ValueError, match=r"x has shape \(5, 12, 3\), a batch \(5,\), but the complement is a batch \(2,\)"
    ):
        batch.projx(x.expand(5, N, P))
    with pytest.raises(ValueError, match=r"scales are a batch \(2,\), the complements a batch \(3,\)"):
        ScaledStiefel(torch.ones(2), basis().expand(3, N, K))
    ok, reason = space.check_vector_on_tangent(space.origin(N, P), torch.zeros(N, P + 1), explain=True)
    assert not ok
    assert "u has shape (12, 4)" in reason


@pytest.mark.parametrize("name", spaces())
def test_numbers_of_rows_that_are_not_the_manifolds_are_refused(name):
    space = spaces()[name]
    with pytest.raises(ValueError, match=r"rows of .*, 12, got n=20"):
        space.dim(20, P)
    with pytest.raises(ValueError, match="rows of the complement, 12, got n=20"):
        space.capacity(P, 20)


def test_leading_dimensions_broadcast_as_before():
    space = RestrictedStiefel(basis())
    x = space.origin(N, P, dtype=torch.float64).as_subclass(torch.Tensor)
    u = torch.randn(5, N, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    looped = torch.stack([space.retr(x, one) for one in u])
    torch.testing.assert_close(space.retr(x, u), looped, rtol=0, atol=1e-14)  # the same products, batched
    torch.testing.assert_close(space.proju(x.expand(5, N, P), u), space.proju(x, u), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", RETRACTIONS)
def test_retractions_and_their_capabilities_name_the_argument(name):
    rule, x = RETRACTIONS[name], torch.eye(N, P, dtype=torch.float64)
    for shape in ((N, 1), (N, P + 1), (P,)):
        wrong = torch.zeros(shape, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"u has shape .* the shape of x"):
            rule(x, wrong)
        if hasattr(rule, "inverse"):
            with pytest.raises(ValueError, match=r"y has shape .* the shape of x"):
                rule.inverse(x, wrong)
        for capability in ("differential", "transport"):
            if hasattr(rule, capability):
                with pytest.raises(ValueError, match=r"v has shape .* the shape of x"):
                    getattr(rule, capability)(x, x, v=wrong)


@pytest.mark.parametrize("name", INFEASIBLE_STEPS)
def test_steps_without_a_retraction_name_the_displacement(name):
    x = torch.eye(N, P, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"d has shape \(12, 1\) and must have the shape of x"):
        INFEASIBLE_STEPS[name](x, x[:, :1], lr=0.1)
    assert INFEASIBLE_STEPS[name](x, d=0 * x, lr=0.1).shape == x.shape


def test_a_subspace_names_shape_and_dtype():
    subspace = ProtectedSubspace(basis())
    for verb in (subspace.project, subspace.project_out, subspace.project_out_twice, subspace.energy_fraction):
        with pytest.raises(ValueError, match=r"x has shape \(3, 12\) and must have 12 rows.*: pass x.mT"):
            verb(torch.zeros(P, N, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"x has shape \(\) and must have 12 rows"):
            verb(torch.zeros((), dtype=torch.float64))
        with pytest.raises(TypeError, match=r"x is a tensor .* got list"):
            verb([1.0] * N)
    with pytest.raises(TypeError, match=r"x has torch.float32 and the basis torch.float64"):
        subspace.project(torch.zeros(N, P))
    assert subspace.project(basis()[:, 0]).shape == (N,)  # one direction as a vector, as before
    with pytest.raises(ValueError, match=r"the complement is \(…, 12, k\).* got shape \(13, 4\)"):
        tangent_lmo(torch.eye(N, P), torch.ones(N, P), complement=torch.zeros(13, 4))


@pytest.mark.parametrize("k", [1, 2])
def test_the_pymanopt_twin_names_its_own_arguments(k):
    twins = pytest.importorskip("manifold_cl.geometry.pymanopt")
    twin = twins.RestrictedStiefel(basis().numpy(), P, k=k)
    right, wrong = twin.random_point(), np.zeros((N, P + 1))
    verbs = {
        "inner_product": ("point", "tangent_vector_a", "tangent_vector_b"),
        "norm": ("point", "tangent_vector"),
        "projection": ("point", "vector"),
        "to_tangent_space": ("point", "vector"),
        "zero_vector": ("point",),
        "random_tangent_vector": ("point",),
        "euclidean_to_riemannian_gradient": ("point", "euclidean_gradient"),
        "euclidean_to_riemannian_hessian": ("point", "euclidean_gradient", "euclidean_hessian", "tangent_vector"),
        "retraction": ("point", "tangent_vector"),
        "exp": ("point", "tangent_vector"),
        "log": ("point_a", "point_b"),
        "dist": ("point_a", "point_b"),
        "pair_mean": ("point_a", "point_b"),
        "transport": ("point_b", "tangent_vector_a"),
    }
    for verb, names in verbs.items():
        for argument in names:
            tensors = {one: wrong if one == argument else right for one in names}
            start = [right] if verb == "transport" else []
            said = r"tangent_vector(_a)?" if verb == "norm" else argument
            with pytest.raises(ValueError, match=rf"^(point|{said}) has shape \(12, 4\) and must have"):
                getattr(twin, verb)(*start, *tensors.values())
    with pytest.raises(TypeError, match=r"vector is an array of floating-point numbers .* got list"):
        twin.projection(right, [0.0])
    with pytest.raises(TypeError, match=r"vector is an array of floating-point numbers .* got an array of int64"):
        twin.projection(right, np.zeros(right.shape, dtype=int))
