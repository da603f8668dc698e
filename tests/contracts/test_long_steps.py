"""Steps of any finite length end on the manifold: through the verbs, the retraction called directly, the optimizer."""

import math

import geoopt
import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel, RiemannianSGD
from manifold_cl.geometry.long_steps import LONG, LONGEST, is_long, shortened

names = pytest.mark.parametrize("name", sorted(RETRACTIONS))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
BOUND = {torch.float32: 2e-6, torch.float64: 1e-14}
"""The promise in float32, fifty roundings in float64."""
SIZES = [(40, 5, 8), (20, 1, 6), (12, 4, 8), (30, 6, 0)]
"""(n, p, k): usual, one column, square (n − k = p), nothing protected."""


def directions(n, p, dtype, draw):
    """Displacements of largest entry 1: of rank one, nearly of rank one, of full rank, with columns of many lengths."""
    single = torch.randn(n, 1, dtype=dtype, generator=draw) @ torch.randn(1, p, dtype=dtype, generator=draw)
    noise = torch.randn(n, p, dtype=dtype, generator=draw)
    spread = noise * 10 ** -torch.linspace(0, 8, p, dtype=dtype)
    return [u / u.abs().max() for u in (single, single + 1e-4 * noise, noise, spread)]


def lengths(dtype):
    return [1.0, 20.0, 1e3, 1e4, 1e7, 1e20, 1e30, torch.finfo(dtype).max / 2]  # half: a tangent part has larger entries


@names
@dtypes
@pytest.mark.parametrize(("n", "p", "k"), SIZES)
def test_a_step_of_any_length_ends_on_the_manifold(name, dtype, n, p, k):
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, k, dtype=dtype, generator=draw))[0] if k else None
    manifold = RestrictedStiefel(basis, retraction=name)
    x = manifold.random(n, p, dtype=dtype, generator=draw).as_subclass(torch.Tensor)
    for direction in directions(n, p, dtype, draw):
        tangent = manifold.proju(x, direction)
        for length in lengths(dtype):
            for y in (manifold.retr(x, length * direction), manifold.retr(x, length * tangent)):
                assert max(manifold.constraint_error(y)) <= BOUND[dtype]
            # A fixed schedule declares the longest step after which it needs the manifold.
            within = float((length * tangent).norm()) <= getattr(RETRACTIONS[name], "longest", math.inf)
            if RETRACTIONS[name].self_correcting and within:
                y = RETRACTIONS[name](x, length * tangent)
                assert manifold.constraint_error(y).orthonormality <= BOUND[dtype]


@pytest.mark.parametrize("name", sorted(n for n, r in RETRACTIONS.items() if r.self_correcting))
@pytest.mark.parametrize("seed", range(4))
def test_a_long_step_from_a_drifted_point_ends_on_the_manifold(name, seed):
    draw = torch.Generator().manual_seed(seed)
    manifold = RestrictedStiefel(torch.randn(30, 7, generator=draw), retraction=name)
    x = manifold.random(30, 4, generator=draw).as_subclass(torch.Tensor) + 1e-3 * torch.randn(30, 4, generator=draw)
    for direction in directions(30, 4, torch.float32, draw):
        for length in (20.0, 1e3, 1e6, 1e20):
            assert max(manifold.constraint_error(manifold.retr(x, length * direction))) <= BOUND[torch.float32]


@names
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_rest_of_its_batch_as_it_is(name, value):
    draw = torch.Generator().manual_seed(2)
    manifold = RestrictedStiefel(torch.randn(24, 5, generator=draw), retraction=name)
    x = manifold.random(3, 24, 4, generator=draw).as_subclass(torch.Tensor)
    u = manifold.proju(x, torch.randn(3, 24, 4, generator=draw) / 10)
    alone = manifold.retr(x, u)
    u[1, 3, 2] = value
    y = manifold.retr(x, u)
    assert not bool(y[1].isfinite().all())
    torch.testing.assert_close(y[[0, 2]], alone[[0, 2]], rtol=0, atol=1e-6)  # float32 and float64 round apart


@dtypes
@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_a_geodesic_of_any_length_ends_on_the_manifold(dtype, metric):
    draw = torch.Generator().manual_seed(1)
    manifold = RestrictedStiefel(torch.randn(40, 8, dtype=dtype, generator=draw), metric=metric)
    x = manifold.random(40, 5, generator=draw).as_subclass(torch.Tensor)
    for direction in directions(40, 5, dtype, draw):
        for length in lengths(dtype):
            assert max(manifold.constraint_error(manifold.expmap(x, length * direction))) <= BOUND[dtype]


@names
def test_lengths_of_a_batch_do_not_touch_each_other(name):
    draw = torch.Generator().manual_seed(2)
    manifold = RestrictedStiefel(torch.randn(30, 8, generator=draw), retraction=name)
    x = manifold.random(5, 30, 4, generator=draw).as_subclass(torch.Tensor)
    size = torch.tensor([1e-3, 1.0, 1e2, 1e6, 1e30])[:, None, None]
    u = size * manifold.proju(x, torch.randn(5, 30, 1, generator=draw) @ torch.randn(5, 1, 4, generator=draw))
    looped = torch.stack([manifold.retr(a, b) for a, b in zip(x, u, strict=True)])
    # A short step beside a long one is taken in float64: a few float32 roundings.
    torch.testing.assert_close(manifold.retr(x, u), looped, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["polar", "polar_light", "cholesky_qr", "cayley"])
@pytest.mark.parametrize("length", [1e2, 1e3, 1e5])
def test_a_long_step_goes_where_it_does_in_exact_arithmetic(name, length):
    draw = torch.Generator().manual_seed(3)
    manifold = RestrictedStiefel(torch.randn(40, 8, dtype=torch.float64, generator=draw), retraction=name)
    x = manifold.random(40, 5, generator=draw).as_subclass(torch.Tensor)
    u = manifold.proju(x, torch.randn(40, 1, dtype=torch.float64, generator=draw) @ torch.ones(1, 5).double())
    u = length * u / u.norm()
    single = RestrictedStiefel(manifold.complement.float(), retraction=name)
    y = single.retr(x.float(), u.float())
    twin = torch.linalg.qr(x + u) if name == "cholesky_qr" else None
    exact = manifold.retr(x, u) if twin is None else twin[0] * twin[1].diagonal().sign()
    if name == "polar":
        left, _, right = torch.linalg.svd(x + u, full_matrices=False)
        torch.testing.assert_close(exact, left @ right, rtol=0, atol=1e-9)  # float64 at a condition of 1e5
    # What rounding u itself to float32 does to x + u, beside columns of x of length 1.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-7 * length + 1e-6)


def test_a_normal_displacement_of_any_length_leads_nowhere():
    draw = torch.Generator().manual_seed(4)
    manifold = RestrictedStiefel(torch.randn(30, 8, generator=draw))
    x = manifold.random(30, 4, generator=draw).as_subclass(torch.Tensor)
    for size in (-1e6, 1e6, 1e20):
        # The normal part of float32 columns is known to 1e-7; 4e6 of it is what a step is shortened to.
        assert float((manifold.retr(x, size * x) - x).abs().max()) < 0.5
        assert max(manifold.constraint_error(manifold.retr(x, size * x))) <= 2e-6


def test_nan_and_infinity_pass_through_and_stay_in_their_member():
    draw = torch.Generator().manual_seed(5)
    manifold = RestrictedStiefel(torch.randn(20, 5, generator=draw))
    x = manifold.random(4, 20, 3, generator=draw).as_subclass(torch.Tensor)
    u = torch.randn(4, 20, 3, generator=draw)
    u[0, 0, 0], u[1, 2, 1], u[2] = torch.nan, torch.inf, 1e30 * u[2]
    y = manifold.retr(x, u)
    assert [bool(member.isnan().any()) for member in y] == [True, True, False, False]
    assert max(manifold.constraint_error(y[2:])) <= 2e-6


def test_length_is_measured_without_overflow():
    top = torch.finfo(torch.float64).max
    u = torch.eye(2, dtype=torch.float64) * torch.tensor([1.0, top, 0.0], dtype=torch.float64)[:, None, None]
    moved = shortened(u)
    assert torch.equal(moved[0], u[0])
    assert float(moved[1].norm()) == pytest.approx(LONGEST)
    assert torch.equal(moved[2], u[2])
    assert is_long(u)
    assert not is_long(u[0])
    assert is_long(u[0] * LONG)
    assert not is_long(u[:0])
    assert is_long(torch.full((2, 2), math.nan))


@pytest.mark.parametrize("retraction", ["polar", "cholesky_qr", "cayley", "exponential"])
@pytest.mark.parametrize("size", [1e6, 1e20, 1e38])
def test_one_huge_gradient_does_not_end_the_training(retraction, size):
    draw = torch.Generator().manual_seed(6)
    manifold = RestrictedStiefel(torch.randn(64, 8, generator=draw), retraction=retraction)
    point = geoopt.ManifoldParameter(manifold.random(64, 8, generator=draw), manifold=manifold)
    optimizer = RiemannianSGD([point], lr=1e-2)
    first = torch.randn(64, 1, generator=draw) @ torch.randn(1, 8, generator=draw)
    for gradient in (size * (first / first.abs().max()), torch.randn(64, 8, generator=draw)):
        point.grad = gradient
        optimizer.step()
        assert max(manifold.constraint_error(point)) <= 2e-6
    assert optimizer.skipped_steps == 0
