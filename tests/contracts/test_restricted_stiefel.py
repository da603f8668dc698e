"""Laws of the manifold, over complements of every size, and its life inside geoopt and torch."""

import copy
import pickle
import subprocess
import sys

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manifold_cl import ProtectedSubspace, RestrictedStiefel
from manifold_cl.geometry import check_projection
from manifold_cl.geometry.subspace import as_basis, stack_bases
from manifold_cl.linalg import MATMULS


def gaussian(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@st.composite
def sizes(draw):
    n = draw(st.integers(2, 24))
    p = draw(st.integers(1, n))
    return n, p, draw(st.integers(0, n - p))


@given(sizes(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_projections_obey_their_laws_at_every_size(size, seed):
    n, p, k = size
    manifold = RestrictedStiefel(gaussian(n, k, seed=seed))
    assert check_projection(manifold, n, p, seed=seed).failures() == ()


@given(sizes(), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_dimension_is_the_rank_of_the_tangent_projector(size, seed):
    n, p, k = size
    manifold = RestrictedStiefel(gaussian(n, k, seed=seed + 1))
    x = manifold.random(n, p, generator=torch.Generator().manual_seed(seed))
    columns = manifold.proju(x.expand(n * p, n, p), torch.eye(n * p, dtype=torch.float64).reshape(n * p, n, p))
    # A projector's singular values are 0 or 1; 1e-8 tells them apart.
    assert int(torch.linalg.matrix_rank(columns.reshape(n * p, n * p), atol=1e-8)) == manifold.dim(n, p)


def test_zero_columns_in_the_complement_change_nothing():
    basis = torch.linalg.qr(gaussian(18, 5))[0]
    tight, padded = RestrictedStiefel(basis), RestrictedStiefel(stack_bases([basis], 18, like=basis, width=9)[0])
    x, u = tight.random(18, 4, generator=torch.Generator().manual_seed(1)), gaussian(18, 4, seed=2)
    for verb in ("proju", "retr", "expmap"):
        # Zero columns add exact zeros; only the order of a sum may differ.
        torch.testing.assert_close(getattr(padded, verb)(x, u), getattr(tight, verb)(x, u), rtol=0, atol=1e-15)


def test_different_complements_stack_into_one_batched_manifold():
    bases = [torch.linalg.qr(gaussian(15, k, seed=k))[0] for k in (2, 7, 0)]
    batched = RestrictedStiefel(stack_bases(bases, 15, like=bases[0]))
    z = gaussian(3, 15, 4)
    x = batched.projx(z)
    for i, basis in enumerate(bases):
        torch.testing.assert_close(x[i], RestrictedStiefel(basis).projx(z[i]), rtol=0, atol=1e-13)  # SVD of 15 × 4


def test_projx_finds_the_nearest_point():
    basis = torch.linalg.qr(gaussian(12, 3))[0]
    manifold = RestrictedStiefel(basis)
    z = gaussian(12, 4, seed=5)
    nearest = manifold.projx(z)
    left, _, right = torch.linalg.svd(z - basis @ (basis.T @ z), full_matrices=False)
    torch.testing.assert_close(nearest, left @ right, rtol=0, atol=1e-13)  # two SVDs of the same matrix
    for seed in range(20):
        other = manifold.random(12, 4, generator=torch.Generator().manual_seed(seed))
        assert float((z - nearest).norm()) <= float((z - other).norm())


def test_projx_near_the_manifold_agrees_with_the_svd():
    manifold = RestrictedStiefel(gaussian(12, 3))
    x = manifold.random(12, 4, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    z = x + 1e-3 * gaussian(12, 4, seed=1)
    off = manifold.complement @ (manifold.complement.T @ z)
    left, _, right = torch.linalg.svd(z - off, full_matrices=False)
    torch.testing.assert_close(manifold.projx(z), left @ right, rtol=0, atol=1e-14)  # quadratic convergence


def test_projx_of_a_matrix_inside_the_protected_space_is_refused():
    basis = torch.linalg.qr(gaussian(10, 4))[0]
    with pytest.raises(ValueError, match="no nearest point"):
        RestrictedStiefel(basis).projx(basis[:, :2] @ gaussian(2, 2))


def test_the_geodesic_has_constant_speed_and_starts_along_its_velocity():
    manifold = RestrictedStiefel(gaussian(14, 4))
    x = manifold.random(14, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    u = manifold.proju(x, gaussian(14, 3, seed=1))
    h = 1e-5
    for t in (0.0, 0.7):
        velocity = (manifold.expmap(x, (t + h) * u) - manifold.expmap(x, (t - h) * u)) / (2 * h)
        # Central differences err by h² times the third derivative, about 1e-9 here.
        assert abs(float(velocity.norm() - u.norm())) < 1e-8
    torch.testing.assert_close((manifold.expmap(x, h * u) - x) / h, u, rtol=0, atol=1e-3)


def test_one_column_agrees_with_geoopts_restricted_sphere():
    basis = torch.linalg.qr(gaussian(9, 3))[0]
    ours, theirs = RestrictedStiefel(basis), geoopt.Sphere(complement=basis)
    x = ours.random(9, 1, generator=torch.Generator().manual_seed(2)).as_subclass(torch.Tensor)
    u = ours.proju(x, gaussian(9, 1, seed=3))
    torch.testing.assert_close(ours.retr(x, u)[:, 0], theirs.retr(x[:, 0], u[:, 0]), rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.expmap(x, u)[:, 0], theirs.expmap(x[:, 0], u[:, 0]), rtol=0, atol=1e-13)


def test_without_a_complement_it_agrees_with_geoopts_euclidean_stiefel():
    ours, theirs = RestrictedStiefel(retraction="qr"), geoopt.EuclideanStiefel()
    x = ours.random(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).as_subclass(torch.Tensor)
    g = gaussian(9, 3, seed=3)
    torch.testing.assert_close(ours.proju(x, g), theirs.proju(x, g), rtol=0, atol=1e-14)
    u = theirs.proju(x, g)
    torch.testing.assert_close(ours.retr(x, u), theirs.retr(x, u), rtol=0, atol=1e-14)


def test_random_points_are_uniform():
    basis = torch.linalg.qr(gaussian(6, 2))[0]
    manifold = RestrictedStiefel(basis)
    x = manifold.random(20000, 6, 2, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    moment = (x @ x.mT).mean(0)
    expected = 2 / 4 * (torch.eye(6, dtype=torch.float64) - basis @ basis.T)
    # The mean of 20000 draws of variance below 0.1: standard error 2e-3, five of them.
    torch.testing.assert_close(moment, expected, rtol=0, atol=1e-2)
    assert float(x.mean(0).abs().max()) < 1.5e-2


def quadratic(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return lambda x: ((a @ x) ** 2).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: geoopt.optim.RiemannianAdam(ps, lr=1e-2),
        lambda ps: geoopt.optim.RiemannianAdam(ps, lr=1e-2, stabilize=10, amsgrad=True),
        lambda ps: geoopt.optim.RiemannianSGD(ps, lr=1e-3),
        lambda ps: geoopt.optim.RiemannianSGD(ps, lr=1e-3, momentum=0.9),
        lambda ps: geoopt.optim.RiemannianSGD(ps, lr=1e-3, momentum=0.9, nesterov=True, stabilize=7),
    ],
    ids=["adam", "adam-stabilized", "sgd", "momentum", "nesterov"],
)
@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_geoopts_optimizers_descend_and_hold_both_constraints(make, retraction):
    manifold = RestrictedStiefel(gaussian(40, 12, dtype=torch.float32), retraction=retraction)
    point = geoopt.ManifoldParameter(
        manifold.random(40, 6, generator=torch.Generator().manual_seed(1)), manifold=manifold
    )
    objective, optimizer = quadratic(40), make([point])
    start = float(objective(point).detach())
    for _ in range(200):
        optimizer.zero_grad()
        objective(point).backward()
        optimizer.step()
        assert max(manifold.constraint_error(point)) <= 2e-6  # the promise, in float32, at every step
    assert float(objective(point).detach()) < 0.6 * start


def test_a_vector_that_is_not_tangent_does_not_break_retr_transp():
    manifold = RestrictedStiefel(gaussian(20, 6))
    x = manifold.random(20, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    y, v = manifold.retr_transp(x, 0.5 * gaussian(20, 3, seed=1), gaussian(20, 3, seed=2))
    assert manifold.check_point_on_manifold(y, atol=1e-13)
    assert manifold.check_vector_on_tangent(y, v, atol=1e-13)


def test_a_point_that_drifted_into_the_protected_space_is_brought_back_by_steps():
    manifold = RestrictedStiefel(gaussian(30, 10, dtype=torch.float32))
    x = manifold.random(30, 4, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    drifted = x + 1e-3 * gaussian(30, 4, seed=1, dtype=torch.float32)
    assert manifold.constraint_error(drifted).protection > 1e-4
    moved = manifold.retr(drifted, 0.01 * manifold.proju(drifted, gaussian(30, 4, seed=2, dtype=torch.float32)))
    assert max(manifold.constraint_error(moved)) < 1e-6  # float32 rounding of a 30-term sum


def test_geoopt_takes_it_for_a_stiefel_manifold():
    manifold = RestrictedStiefel(gaussian(8, 2))
    assert isinstance(manifold, geoopt.Stiefel)
    scaled = geoopt.Scaled(manifold, 2.0)
    x = manifold.random(8, 3, generator=torch.Generator().manual_seed(0))
    u = manifold.proju(x, gaussian(8, 3, seed=1))
    torch.testing.assert_close(scaled.retr(x, u), manifold.retr(x, u / 2.0), rtol=0, atol=1e-14)


def test_half_precision_reaches_the_module_but_never_the_complement():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.manifold = RestrictedStiefel(gaussian(16, 5, dtype=torch.float32))

    layer = Layer()
    before = layer.manifold.complement.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.manifold.complement.dtype == torch.float32
    assert torch.equal(layer.manifold.complement, before)
    assert layer.double().manifold.complement.dtype == torch.float64
    assert "manifold.complement" in layer.state_dict()


def test_copies_and_pickles_keep_complement_and_retraction():
    manifold = RestrictedStiefel(gaussian(8, 2), retraction="qr")
    for twin in (copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold))):
        assert torch.equal(twin.complement, manifold.complement)
        assert twin.retraction == manifold.retraction


COMPILING = """
import torch
from manifold_cl import RestrictedStiefel
draw = torch.Generator().manual_seed(0)
manifold = RestrictedStiefel(torch.randn(12, 3, dtype=torch.float64, generator=draw))
x = manifold.random(12, 4, generator=draw).as_subclass(torch.Tensor)
u = 0.1 * torch.randn(12, 4, dtype=torch.float64, generator=draw)
for verb in (manifold.retr, manifold.proju):
    compiled = torch.compile(verb, backend="eager", fullgraph=True)
    # The compiled loop runs more iterations, to the same limit.
    torch.testing.assert_close(compiled(x, u), verb(x, u), rtol=0, atol=1e-14)
"""


@pytest.mark.slow
def test_verbs_compile_without_a_graph_break():
    # In a process of its own: the tests' shape checker wraps functions in a way that dynamo cannot trace.
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILING], check=True)


def test_tf32_and_autocast_do_not_reach_the_geometry():
    manifold = RestrictedStiefel(gaussian(64, 20, dtype=torch.float32))
    x = manifold.random(64, 8, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    u = 0.1 * gaussian(64, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = manifold.retr(x, u)
    assert y.dtype == torch.float32
    assert max(manifold.constraint_error(y)) < 1e-6  # bfloat16 products would leave 1e-3
    assert torch.get_float32_matmul_precision() == "highest"


PRECISION = """
import torch
from manifold_cl import RestrictedStiefel
from manifold_cl.linalg import full_precision

cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
m = RestrictedStiefel(torch.randn(8, 3))
x = m.random(8, 2)

def inside():
    m.retr(x, x)  # no switch of torch's makes it raise
    with full_precision():
        return {cuda.fp32_precision, mkldnn.fp32_precision}

for switch in ("high", "medium"):
    torch.set_float32_matmul_precision(switch)
    assert inside() == {"ieee"}
    assert torch.get_float32_matmul_precision() == switch
torch.set_float32_matmul_precision("highest")
cuda.fp32_precision = mkldnn.fp32_precision = "none"

torch.backends.fp32_precision = "tf32"  # as transformers does; read through the old switch, it raises
assert inside() == {"ieee"}
assert (cuda.fp32_precision, mkldnn.fp32_precision) == ("tf32", "tf32")
torch.backends.fp32_precision = "ieee"
assert cuda.fp32_precision == "ieee"  # still following the general setting
torch.backends.fp32_precision = "none"

mkldnn.fp32_precision = "bf16"
assert inside() == {"ieee", "none"}
assert (cuda.fp32_precision, mkldnn.fp32_precision) == ("none", "bf16")
"""


@pytest.mark.slow
@pytest.mark.skipif(not MATMULS, reason="this torch has one switch for all backends")
def test_products_are_float32_whatever_switch_is_set_and_the_switches_are_left_alone():
    subprocess.run([sys.executable, "-W", "ignore", "-c", PRECISION], check=True)  # they are global


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: RestrictedStiefel(gaussian(16, 13)).random(16, 8), ValueError, r"leaves 3 free directions in R\^16"),
        (lambda: RestrictedStiefel(gaussian(16, 4).bfloat16()), TypeError, "float32 or float64, got torch.bfloat16"),
        (lambda: RestrictedStiefel(gaussian(4, 16)), ValueError, "at most n columns"),
        (lambda: RestrictedStiefel(gaussian(16, 1).expand(16, 2)), ValueError, "dependent columns"),
        (lambda: RestrictedStiefel(gaussian(16, 2)).random(15, 2), ValueError, "points have 16 rows here"),
        (lambda: RestrictedStiefel().random(5), ValueError, r"a point is a matrix"),
        (lambda: RestrictedStiefel().random((12, 3), 4), TypeError, r"\(\(12, 3\), 4\)"),
        (lambda: RestrictedStiefel().random("12,3"), TypeError, "12,3"),
        (lambda: RestrictedStiefel().origin(12.0, 3), TypeError, "12.0"),
        (lambda: RestrictedStiefel().random_naive(None), TypeError, "None"),
        (lambda: RestrictedStiefel().capacity(3), ValueError, "pass n="),
        (lambda: ProtectedSubspace(gaussian(6, 2)), ValueError, "not orthonormal"),
    ],
)
def test_wrong_input_is_refused_with_the_numbers(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("draw", ["random", "origin", "random_naive"])
@pytest.mark.parametrize("size", [((12, 3),), (torch.Size([2, 12, 3]),), ([12, 3],), (2, 12, 3)])
def test_points_are_drawn_for_a_size_in_numbers_or_in_a_tuple(draw, size):
    manifold = RestrictedStiefel(gaussian(12, 4))
    point = getattr(manifold, draw)(*size)
    assert point.shape[-2:] == (12, 3)
    assert point.shape == torch.Size(size if len(size) > 1 else size[0])
    assert manifold.check_point_on_manifold(point, atol=1e-13)


def test_a_complement_may_be_an_array_and_is_copied():
    array = gaussian(12, 3).numpy()
    array.setflags(write=False)
    manifold = RestrictedStiefel(array)
    torch.testing.assert_close(manifold.complement, RestrictedStiefel(gaussian(12, 3)).complement, rtol=0, atol=0)
    assert ProtectedSubspace.from_directions(array).k == 3
    assert RestrictedStiefel(array.astype("float32")).complement.dtype == torch.float32


@pytest.mark.parametrize("complement", [[[1.0], [0.0]], [torch.ones(2)], (1.0, 0.0), "F", 3])
def test_a_complement_of_another_kind_is_refused_by_name(complement):
    with pytest.raises(TypeError, match=rf"got {type(complement).__name__}: .*torch.stack"):
        as_basis(complement)


@pytest.mark.parametrize("dtype", [object, "U3", "datetime64[s]"])
def test_a_complement_of_arrays_that_are_no_numbers_is_refused_with_their_kind(dtype):
    array = np.zeros((6, 2)).astype("int64").astype(dtype)
    with pytest.raises(TypeError, match=str(array.dtype).split("[")[0]):
        RestrictedStiefel(array)


def test_a_parameter_off_the_manifold_or_of_another_size_is_caught_by_geoopt():
    manifold = RestrictedStiefel(gaussian(10, 4))
    ok, reason = manifold.check_point_on_manifold(gaussian(10, 2), explain=True)
    assert not ok
    assert "xᵀx − I" in reason
    inside = manifold.complement[:, :2].clone()
    ok, reason = manifold.check_point_on_manifold(inside, explain=True)
    assert not ok
    assert "protected subspace" in reason
    with pytest.raises(ValueError, match="too few for rank 7"):
        geoopt.ManifoldParameter(gaussian(10, 7), manifold=manifold)


def test_padding_takes_no_room():
    basis = torch.linalg.qr(gaussian(10, 4))[0]
    padded = RestrictedStiefel(stack_bases([basis], 10, like=basis, width=9)[0])
    assert (padded.k, padded.width) == (4, 9)
    assert padded.capacity(5) == 1
    assert padded.random(10, 6, generator=torch.Generator().manual_seed(0)).shape == (10, 6)


def test_the_nearest_point_has_a_gradient_far_away_too():
    manifold = RestrictedStiefel(gaussian(9, 2))
    frame = manifold.random(9, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    x = (2 * frame).requires_grad_()  # all singular values agree: an SVD's own gradient is NaN here
    assert torch.autograd.gradcheck(manifold.projx, (x,))
    assert torch.autograd.gradcheck(manifold.projx, (gaussian(9, 3, seed=3).requires_grad_(),))


def test_loading_writes_into_no_subspace_and_no_other_manifold():
    subspace = ProtectedSubspace.from_directions(gaussian(9, 2))
    before = subspace.basis.clone()
    mine, other = RestrictedStiefel(subspace), RestrictedStiefel(subspace)
    loaded = ProtectedSubspace.from_directions(gaussian(9, 2, seed=1))
    mine.load_state_dict(RestrictedStiefel(loaded).state_dict())
    assert torch.equal(mine.complement, loaded.basis)
    assert torch.equal(subspace.basis, before)
    assert torch.equal(other.complement, before)


def test_no_points_have_no_error():
    manifold = RestrictedStiefel(gaussian(9, 2))
    assert manifold.constraint_error(torch.zeros(0, 9, 3)) == (0.0, 0.0)
    empty = torch.zeros(0, 9, 3, dtype=torch.float64)
    assert manifold.logmap(empty, empty).shape == (0, 9, 3)
