"""Laws of the manifold at every size, in both precisions, for steps of every length."""

import math

import pytest
import torch
from hypothesis import strategies as st
from property_cases import EPS, LENGTHS, PROMISE, SHORT, cases, close, double, holds_for, single

from manifold_cl import RETRACTIONS, RestrictedStiefel
from manifold_cl.geometry import BetaMetric, GeneralizedStiefel, ScaledStiefel, tangent_lmo
from manifold_cl.geometry.retractions.protocol import Invertible
from manifold_cl.geometry.subspace import stack_bases

names = st.sampled_from(sorted(RETRACTIONS))
lengths = st.sampled_from(LENGTHS)
short = st.sampled_from(SHORT)
metrics = st.sampled_from(["euclidean", "canonical", BetaMetric(0.25), BetaMetric(0.8), BetaMetric(2.0)])
two_metrics = st.sampled_from(["euclidean", "canonical"])
NOT_ROTATED = ("qr", "cholesky_qr")
"""Retractions that depend on the basis of a frame: their R factor is triangular."""


def on_manifold(manifold, y, dtype):
    assert y.dtype == dtype
    assert max(manifold.constraint_error(y)) <= PROMISE[dtype]


@holds_for(200, case=cases(), name=names, metric=two_metrics, length=lengths)
def test_a_retraction_of_any_length_ends_on_the_manifold(case, name, metric, length):
    manifold = case.manifold(retraction=name, metric=metric)
    x = case.point(manifold)
    on_manifold(manifold, manifold.retr(x, case.vector(manifold, x, length)), case.dtype)


@holds_for(case=cases(), name=names, length=lengths)
def test_a_vector_that_is_not_tangent_ends_on_the_manifold_too(case, name, length):
    manifold = case.manifold(retraction=name)
    x = case.point(manifold)
    on_manifold(manifold, manifold.retr(x, length * case.gaussian(*x.shape)), case.dtype)


@holds_for(case=cases(), metric=metrics, length=lengths)
def test_a_geodesic_of_any_length_ends_on_the_manifold(case, metric, length):
    manifold = case.manifold(metric=metric)
    x = case.point(manifold)
    on_manifold(manifold, manifold.expmap(x, case.vector(manifold, x, length)), case.dtype)


@holds_for(case=cases(), size=st.sampled_from([1e-20, 1e-3, 1.0, 1e6, 1e20]))
def test_projx_is_idempotent_and_finds_the_nearest_point(case, size):
    manifold = case.manifold()
    z = case.gaussian(*case.batch, case.n, case.p)
    off = manifold._project_out(z.double())
    left, sigma, right = torch.linalg.svd(off, full_matrices=False)
    if float((sigma[..., -1] / sigma[..., 0]).min()) < 1e-3:
        return  # nearly no nearest point: its distance is still the least, its entries are ill-conditioned
    y = manifold.projx(size * z)
    on_manifold(manifold, y, case.dtype)
    close(y.double(), left @ right, 5e3 * EPS[case.dtype])  # condition 1e3 and a few roundings
    close(manifold.projx(y), y, 20 * EPS[case.dtype])


@holds_for(case=cases(), length=st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e15]))
def test_proju_is_an_orthogonal_projection(case, length):
    manifold = case.manifold()
    x = case.point(manifold)
    a, b = (length * case.gaussian(*x.shape) for _ in range(2))
    u, v = manifold.proju(x, a), manifold.proju(x, b)
    bound = 50 * EPS[case.dtype] * length * case.n  # sums of n products of entries of this size
    close(manifold.proju(x, u), u, bound)
    inside = x.mT @ u
    assert float((inside + inside.mT).abs().max()) <= bound
    if manifold.width:
        assert float((manifold.complement.mT @ u).abs().max()) <= bound
    left, right = (u.double() * b.double()).sum((-2, -1)), (a.double() * v.double()).sum((-2, -1))
    close(left, right, bound * length * case.n * case.p)


@holds_for(case=double(), metric=metrics)
def test_the_gradient_represents_the_derivative_in_every_metric(case, metric):
    manifold = case.manifold(metric=metric)
    x = case.point(manifold)
    g, v = case.gaussian(*x.shape), case.vector(manifold, x)
    gradient = manifold.egrad2rgrad(x, g)
    close(manifold.inner(x, gradient, v), (g * v).sum((-2, -1)), 1e-12)
    close(manifold.proju(x, gradient), gradient, 1e-12)


@holds_for(case=double(), metric=metrics)
def test_the_hessian_is_symmetric(case, metric):
    manifold = case.manifold(metric=metric)
    x = case.point(manifold)
    root = case.gaussian(case.n, case.n)
    a = root + root.mT  # of f(x) = tr(xᵀ a x) / 2
    u, v = case.vector(manifold, x), case.vector(manifold, x)
    one, other = (manifold.ehess2rhess(x, a @ x, a @ w, w) for w in (u, v))
    close(manifold.inner(x, one, v), manifold.inner(x, other, u), 1e-11)  # |a| is about 10


@holds_for(case=double(), name=names, metric=metrics, length=short)
def test_a_rotation_of_the_basis_of_the_frame_commutes_with_every_verb(case, name, metric, length):
    manifold = case.manifold(retraction=name, metric=metric)
    x = case.point(manifold)
    u, o = case.vector(manifold, x, length), case.orthogonal(case.p)
    verbs = ["expmap", "egrad2rgrad", "proju", *([] if name in NOT_ROTATED else ["retr"])]
    for verb in verbs:
        close(getattr(manifold, verb)(x @ o, u @ o), getattr(manifold, verb)(x, u) @ o, 1e-12)


@holds_for(case=double(), name=names, length=short)
def test_signs_of_columns_commute_with_every_retraction(case, name, length):
    manifold = case.manifold(retraction=name)
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    signs = torch.where(case.gaussian(case.p) > 0, 1.0, -1.0).double()
    close(manifold.retr(x * signs, u * signs), manifold.retr(x, u) * signs, 1e-12)


@holds_for(case=single(), name=names, metric=metrics, length=short)
def test_a_rotation_of_the_space_commutes_with_every_verb(case, name, metric, length):
    manifold = case.manifold(retraction=name, metric=metric)
    q = case.orthogonal(case.n)
    turned = RestrictedStiefel(None if case.k == 0 else q @ manifold.complement, retraction=name, metric=metric)
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    for verb in ("retr", "expmap", "egrad2rgrad", "proju"):
        close(getattr(turned, verb)(q @ x, q @ u), q @ getattr(manifold, verb)(x, u), 1e-12)
    close(turned.inner(q @ x, q @ u), manifold.inner(x, u), 1e-12)


@holds_for(
    case=single(kinds=("usual", "one column", "no freedom")), name=names, length=short, padding=st.integers(0, 3)
)
def test_only_the_span_of_the_protected_directions_matters(case, name, length, padding):
    manifold = case.manifold(retraction=name)
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    basis = manifold.complement @ case.orthogonal(case.k)
    padded = stack_bases([basis], case.n, like=basis, width=min(case.k + padding, case.n))[0]
    other = RestrictedStiefel(padded, retraction=name)
    for verb in ("retr", "expmap", "proju"):
        close(getattr(other, verb)(x, u), getattr(manifold, verb)(x, u), 1e-13)
    assert (other.k, other.dim(case.n, case.p)) == (manifold.k, manifold.dim(case.n, case.p))


@holds_for(case=double(), name=names, metric=two_metrics)
def test_a_retraction_agrees_with_the_geodesic_to_its_order(case, name, metric):
    manifold = case.manifold(retraction=name, metric=metric)
    x = case.point(manifold)
    u = case.vector(manifold, x)
    order = min(RETRACTIONS[name].order[metric], 3)
    for t in (1e-2, 1e-3):
        error = torch.linalg.matrix_norm(manifold.retr(x, t * u) - manifold.expmap(x, t * u)).max()
        # The first term that differs has a coefficient below 2 for a vector of length 1; below it is rounding.
        assert float(error) <= 2 * t ** (order + 1) + 1e-13


@holds_for(case=cases(dtypes=(torch.float32,)), name=names, metric=two_metrics, length=short)
def test_float32_agrees_with_float64(case, name, metric, length):
    manifold = case.manifold(retraction=name, metric=metric)
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    wide = RestrictedStiefel(None if case.k == 0 else manifold.complement.double(), retraction=name, metric=metric)
    exact = wide.projx(x.double())
    for verb in ("retr", "expmap", "proju"):
        close(getattr(manifold, verb)(x, u).double(), getattr(wide, verb)(exact, u.double()), 3e-6)


@holds_for(
    case=double(), metric=st.sampled_from(["euclidean", "canonical", BetaMetric(0.4), BetaMetric(0.8)]), length=short
)
def test_the_logarithm_undoes_the_geodesic(case, metric, length):
    manifold = case.manifold(metric=metric)
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    y = manifold.expmap(x, u)
    close(manifold.logmap(x, y), u, 1e-9)  # the iteration's limit
    close(manifold.dist(x, y), manifold.norm(x, u), 1e-9)


@holds_for(20, case=double(), metric=two_metrics)
def test_the_distance_obeys_the_axioms_of_a_metric(case, metric):
    manifold = case.manifold(metric=metric)
    x = case.point(manifold)
    y, z = (manifold.expmap(x, case.vector(manifold, x, 0.7)) for _ in range(2))
    there = manifold.dist(x, y)
    close(there, manifold.dist(y, x), 1e-9)
    close(manifold.dist(x, x), torch.zeros_like(there), 1e-9)
    assert bool((manifold.dist(y, z) <= there + manifold.dist(x, z) + 1e-9).all())
    assert bool((there >= torch.linalg.matrix_norm(x - y) * (0.7 if metric == "canonical" else 1) - 1e-9).all())


@holds_for(
    case=double(),
    length=short,
    name=st.sampled_from([n for n, r in sorted(RETRACTIONS.items()) if isinstance(r, Invertible)]),
)
def test_an_inverse_retraction_undoes_the_retraction(case, name, length):
    manifold = case.manifold(retraction=name)
    x = case.point(manifold)
    u = case.vector(manifold, x, min(length, 0.5))
    close(manifold.inverse_retr(x, manifold.retr(x, u)), u, 1e-9)


@holds_for(case=double(), metric=metrics, factor=st.sampled_from([-1e6, -1.0, 1e-6, 3.0]))
def test_the_inner_product_obeys_its_axioms(case, metric, factor):
    manifold = case.manifold(metric=metric)
    x = case.point(manifold)
    u, v, w = (case.vector(manifold, x) for _ in range(3))
    bound = 1e-12 * max(1.0, abs(factor))
    close(manifold.inner(x, u, v), manifold.inner(x, v, u), bound)
    close(manifold.inner(x, factor * u + v, w), factor * manifold.inner(x, u, w) + manifold.inner(x, v, w), bound)
    assert bool((manifold.inner(x, u) >= 0).all())
    close(manifold.norm(x, factor * u), abs(factor) * manifold.norm(x, u), bound)
    assert bool((manifold.inner(x, u, v).abs() <= manifold.norm(x, u) * manifold.norm(x, v) + 1e-12).all())


SETTINGS = [
    {"retraction": "polar"},
    {"retraction": "polar", "transport": "differentiated"},
    {"retraction": "exponential"},
    {"retraction": "cayley", "metric": "canonical"},
    {"transport": "isometric", "metric": "canonical"},
    {"transport": "parallel", "metric": "canonical"},
]


@holds_for(case=double(), options=st.sampled_from(SETTINGS), length=short)
def test_a_transport_is_linear_and_tangent(case, options, length):
    manifold = case.manifold(**options)
    x = case.point(manifold)
    u, v, w = case.vector(manifold, x, length), case.vector(manifold, x), case.vector(manifold, x)
    y, carried = manifold.retr_transp(x, u, v)
    close(y, manifold.retr(x, u), 1e-13)
    close(manifold.proju(y, carried), carried, 1e-12)
    both = manifold.retr_transp(x, u, 2 * v - 3 * w)[1]
    close(both, 2 * carried - 3 * manifold.retr_transp(x, u, w)[1], 1e-11)
    if manifold.reversible:
        close(manifold.norm(y, carried), manifold.norm(x, v), 1e-11)


@holds_for(case=double(), options=st.sampled_from(SETTINGS[4:]), length=short)
def test_a_step_back_with_the_carried_vector_returns(case, options, length):
    manifold = case.manifold(**options)
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    y, carried = manifold.retr_transp(x, u, u)
    back, again = manifold.retr_transp(y, -carried, carried)
    close(back, x, 1e-11)
    close(again, u, 1e-11)


@holds_for(case=double(), length=short)
def test_a_geodesic_goes_on_along_its_parallel_velocity(case, length):
    manifold = case.manifold(metric="canonical", transport="parallel")
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    y, velocity = manifold.expmap_transp(x, u, u)
    close(manifold.expmap(y, 0.5 * velocity), manifold.expmap(x, 1.5 * u), 1e-11)


@holds_for(case=cases(batches=((2,), (3,), (2, 2))), name=names, metric=metrics, length=lengths)
def test_a_batch_does_what_its_members_do_alone(case, name, metric, length):
    manifold = case.manifold(retraction=name, metric=metric)
    x = case.point(manifold)
    u = case.vector(manifold, x, length)
    flat = None if case.k == 0 else manifold.complement.reshape(-1, case.n, case.k)
    # Beside a long step a short one is taken in float64; a long one multiplies the rounding of its member.
    bound = 20 * EPS[case.dtype] * (1 if length <= 8 else 1e7)
    for verb in ("retr", "expmap"):
        together = getattr(manifold, verb)(x, u).reshape(-1, case.n, case.p)
        for i, one in enumerate(together):
            alone = RestrictedStiefel(None if flat is None else flat[i], retraction=name, metric=metric)
            at = (a.reshape(-1, case.n, case.p)[i] for a in (x, u))
            if length <= 8:
                close(getattr(alone, verb)(*at), one, bound)
            else:
                assert max(alone.constraint_error(one)) <= PROMISE[case.dtype]


@holds_for(case=cases())
def test_the_constraint_error_is_what_its_formula_says(case):
    manifold = case.manifold()
    x = case.point(manifold) + 1e-3 * case.gaussian(*case.batch, case.n, case.p)
    wide = x.double()
    found = manifold.constraint_error(x)
    gram = wide.mT @ wide - torch.eye(case.p).double()
    assert found.orthonormality == pytest.approx(float(gram.abs().max()), rel=1e-9)
    leak = float((manifold.complement.double().mT @ wide).abs().max()) if case.k else 0.0
    assert found.protection == pytest.approx(leak, rel=1e-9)


@holds_for(
    case=double(), norm=st.sampled_from(["spectral", "frobenius", "blocks"]), size=st.sampled_from([1e-12, 1.0, 1e9])
)
def test_a_steepest_direction_is_tangent_of_norm_one_and_optimal(case, norm, size):
    manifold = case.manifold()
    x = case.point(manifold)
    g = size * case.gaussian(*x.shape)
    found = tangent_lmo(x, g, norm=norm, complement=manifold.complement)
    close(manifold.proju(x, found.direction), found.direction, 1e-10)
    order = "fro" if norm == "frobenius" else 2
    assert (
        float(torch.linalg.matrix_norm(found.direction, order).max())
        <= (math.sqrt(2) if norm == "blocks" else 1) + 1e-9
    )
    close(found.value / size, (g * found.direction).sum((-2, -1)) / size, 1e-9)
    assert bool((found.value >= -1e-12 * size).all())
    for _ in range(3):  # no other direction of norm 1 has more
        v = case.vector(manifold, x)
        length = torch.linalg.matrix_norm(v, order, keepdim=True).clamp_min(1e-12)
        assert bool(((g * v / length).sum((-2, -1)) <= found.value * (1 + 1e-9) + 1e-9 * size).all())
    if case.k:
        inside = manifold.complement @ (manifold.complement.mT @ g)
        assert float(tangent_lmo(x, inside, norm=norm, complement=manifold.complement).direction.abs().max()) == 0


@holds_for(case=double(batches=((), (2,))), scale=st.sampled_from([1e-3, 0.7, 1e3]), length=short)
def test_scaled_frames_do_what_frames_do(case, scale, length):
    frames = case.manifold()
    manifold = ScaledStiefel(scale, frames.complement)
    y = case.point(frames)
    u = case.vector(frames, y, length)
    x = scale * y
    close(manifold.retr(x, scale * u) / scale, frames.retr(y, u), 1e-12)
    close(manifold.proju(x, x + u), manifold.proju(x, manifold.proju(x, x + u)), 1e-12 * max(1, scale))
    assert max(manifold.constraint_error(manifold.retr(x, scale * u))) <= PROMISE[torch.float64]


@holds_for(case=single(), length=short)
def test_generalized_frames_stay_orthonormal_in_their_inner_product(case, length):
    root = case.gaussian(case.n, case.n) / case.n
    b = torch.eye(case.n, dtype=torch.float64) + root @ root.mT
    manifold = GeneralizedStiefel(b)
    x = manifold.random(case.n, case.p, dtype=torch.float64, generator=case.generator)
    x = x.as_subclass(torch.Tensor)
    u = manifold.proju(x, case.gaussian(case.n, case.p))
    size = float(manifold.norm(x, u))
    y = manifold.retr(x, u * (length / size) if size > 1e-9 else u)
    close(y.mT @ b @ y, torch.eye(case.p).double(), 1e-12)
    close(manifold.proju(x, u), u, 1e-11)


@holds_for(case=cases(), kind=st.sampled_from(["random", "origin"]))
def test_drawn_points_are_on_the_manifold_and_repeat(case, kind):
    manifold = case.manifold()
    size = (*case.batch, case.n, case.p)
    if kind == "origin":
        one, two = (manifold.origin(*size, dtype=case.dtype, seed=case.seed) for _ in range(2))
    else:
        one, two = (
            manifold.random(*size, dtype=case.dtype, generator=torch.Generator().manual_seed(case.seed))
            for _ in range(2)
        )
    assert torch.equal(one, two)
    on_manifold(manifold, one.as_subclass(torch.Tensor), case.dtype)


@holds_for(case=single(), wrong=st.sampled_from(["nan", "inf", "half", "rows", "room", "wide", "vector"]))
def test_wrong_input_is_refused(case, wrong):
    basis = case.gaussian(case.n, max(case.k, 1))
    n, p = case.n, case.p
    if wrong in ("nan", "inf"):
        basis[0, 0] = float(wrong)
        with pytest.raises(ValueError, match="NaN or infinite"):
            RestrictedStiefel(basis)
    elif wrong == "half":
        with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
            RestrictedStiefel(basis.bfloat16())
        with pytest.raises(TypeError, match=r"float32 or float64, got torch\.float16"):
            RestrictedStiefel().proju(case.gaussian(n, p).half(), case.gaussian(n, p).half())
    elif wrong == "rows":
        with pytest.raises(ValueError, match=f"points have {n} rows here"):
            RestrictedStiefel(torch.eye(n, dtype=torch.float64)[:, :1]).random(n + 1, 1)
    elif wrong == "room":
        with pytest.raises(ValueError, match=rf"leaves {p - 1} free directions in R\^{n}, too few for rank {p}"):
            RestrictedStiefel(torch.eye(n, dtype=torch.float64)[:, : n - p + 1]).random(n, p)
    elif wrong == "wide":
        with pytest.raises(ValueError, match="at most n columns"):
            RestrictedStiefel(case.gaussian(n, n + 1))
    else:
        with pytest.raises(ValueError, match="a point is a matrix"):
            RestrictedStiefel().random(n)
