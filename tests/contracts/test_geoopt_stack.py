"""The manifold inside geoopt and torch: optimizers, samplers, products, copies, batches; and input it refuses."""

import copy
import io
import pickle

import geoopt
import numpy as np
import pytest
import torch
from torch import nn

from manifold_cl import RETRACTIONS, RestrictedStiefel

CHOICES = [
    {},
    {"metric": "canonical"},
    {"transport": "isometric"},
    {"metric": "canonical", "transport": "parallel"},
    {"retraction": "polar_light", "transport": "differentiated"},
]
choices = pytest.mark.parametrize("options", CHOICES, ids=lambda o: "-".join(o.values()) or "default")


def gaussian(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(manifold, *size, dtype=None):
    start = manifold.random(*size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return geoopt.ManifoldParameter(start, manifold=manifold)


def quadratic(n, dtype=torch.float64):
    a = gaussian(n, n, seed=9, dtype=dtype)
    return lambda x: ((a @ x) ** 2).sum()


@pytest.mark.slow
@choices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_and_momentum_descend_and_hold_the_constraint(options, dtype):
    for make in (
        lambda ps: geoopt.optim.RiemannianAdam(ps, lr=1e-2),
        lambda ps: geoopt.optim.RiemannianSGD(ps, lr=1e-3, momentum=0.9),
    ):
        manifold = RestrictedStiefel(gaussian(24, 6, dtype=dtype), **options)
        point, objective = parameter(manifold, 24, 4), quadratic(24, dtype)
        optimizer, start = make([point]), float(objective(point).detach())
        for _ in range(80):
            optimizer.zero_grad()
            objective(point).backward()
            optimizer.step()
        assert float(objective(point).detach()) < 0.7 * start
        assert max(manifold.constraint_error(point)) <= (
            2e-6 if dtype == torch.float32 else 1e-13
        )  # the documented bound


@pytest.mark.slow
@pytest.mark.parametrize("retraction", ["polar", "cholesky_qr", "cayley", "exponential"])
def test_six_thousand_float32_steps_never_leak(retraction):
    manifold = RestrictedStiefel(gaussian(20, 5, dtype=torch.float32), retraction=retraction)
    point, objective = parameter(manifold, 20, 10), quadratic(20, torch.float32)
    optimizer = geoopt.optim.RiemannianSGD([point], lr=1e-3)
    for _ in range(6000):
        optimizer.zero_grad()
        objective(point).backward()
        optimizer.step()
    assert manifold.constraint_error(point).protection <= 1e-6  # projecting only the direction leaves 3e-4
    assert manifold.constraint_error(point).orthonormality <= 1e-6


@pytest.mark.slow
@choices
@pytest.mark.parametrize("search", [("armijo", "steepest"), ("wolfe", "fr"), ("wolfe", "pr")])
def test_line_search_descends(options, search):
    method, direction = search
    manifold = RestrictedStiefel(gaussian(16, 4), **options)
    point, objective = parameter(manifold, 16, 3), quadratic(16)
    optimizer = geoopt.optim.RiemannianLineSearch(
        [point], line_search_method=method, cg_method=direction, fallback_stepsize=1e-3
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(point)
        loss.backward()
        return loss.item()  # a tensor would meet numpy inside scipy

    start = float(closure())
    for _ in range(15):
        optimizer.step(closure)
    assert float(closure()) < 0.5 * start
    assert max(manifold.constraint_error(point)) < 1e-13  # float64


@pytest.mark.parametrize("retraction", ["cayley", "iterative_cayley", "polar", "qr"])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_a_wolfe_search_finds_its_first_step_with_the_default_transport(retraction, size):
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        manifold = RestrictedStiefel(torch.randn(50, 10, dtype=torch.float64, generator=draw), retraction=retraction)
        point = geoopt.ManifoldParameter(manifold.random(50, 5, generator=draw), manifold=manifold)
        root = torch.randn(50, 50, dtype=torch.float64, generator=draw)
        weights = size * torch.arange(1.0, 6.0, dtype=torch.float64)
        optimizer = geoopt.optim.RiemannianLineSearch([point], line_search_method="wolfe")

        def closure(point=point, root=root, weights=weights, optimizer=optimizer):
            optimizer.zero_grad()
            loss = -((root.T @ point).square() * weights).sum()
            loss.backward()
            return float(loss.detach())

        before = closure()
        optimizer.step(closure)
        assert optimizer.last_step_size is not None
        assert closure() < before


@pytest.mark.parametrize("sampler", [geoopt.samplers.RHMC, geoopt.samplers.SGRHMC, geoopt.samplers.RSGLD])
def test_samplers_run_where_the_step_can_be_undone(sampler):
    manifold = RestrictedStiefel(gaussian(8, 2), transport="isometric")
    point = parameter(manifold, 8, 2)
    options = {"epsilon": 1e-2} | ({} if sampler is geoopt.samplers.RSGLD else {"n_steps": 3})
    chain = sampler([point], **options)
    objective = quadratic(8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = np.random.get_state()
        np.random.seed(0)  # geoopt draws its acceptances there
        for _ in range(20):
            chain.step(lambda: -objective(point))
        np.random.set_state(state)
    assert max(manifold.constraint_error(point)) < 1e-13  # float64


def test_samplers_refuse_a_transport_that_cannot_be_undone():
    point = parameter(RestrictedStiefel(gaussian(8, 2)), 8, 2)
    with pytest.raises(ValueError, match="reversible"):
        geoopt.samplers.RHMC([point])


@choices
def test_scaling_multiplies_distances(options):
    manifold = RestrictedStiefel(gaussian(12, 3), **options)
    scaled = geoopt.Scaled(manifold, 2.0)
    assert scaled.reversible == manifold.reversible
    assert isinstance(scaled, geoopt.Scaled)
    x = manifold.random(12, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    u = manifold.proju(x, gaussian(12, 3, seed=1))
    u = u / manifold.norm(x, u)
    y = manifold.expmap(x, u)
    assert float(scaled.dist(x, y)) == pytest.approx(2.0, abs=1e-11)  # the logarithm's last digits
    torch.testing.assert_close(scaled.expmap(x, scaled.logmap(x, y)), y, rtol=0, atol=1e-11)
    near = manifold.retr(x, 0.1 * u)
    if options.get("retraction") != "exponential" and hasattr(manifold.retraction, "inverse"):
        # The scaled inverse is 2u and the scaled retraction halves it again.
        torch.testing.assert_close(scaled.retr(x, scaled.inverse_retr(x, near)), near, rtol=0, atol=1e-12)
    y, v = scaled.retr_transp(x, 2 * u, u)
    torch.testing.assert_close(y, manifold.retr(x, u), rtol=0, atol=1e-14)  # the same step
    assert manifold.check_vector_on_tangent(y, v, atol=1e-13)


@choices
def test_products_step_every_factor_on_its_own_manifold(options):
    ours = RestrictedStiefel(gaussian(10, 3), **options)
    product = geoopt.ProductManifold((ours, (10, 2)), (geoopt.Sphere(), 4))
    point = geoopt.ManifoldParameter(
        product.pack_point(ours.random(10, 2, generator=torch.Generator().manual_seed(0)), sphere_point()),
        manifold=product,
    )
    optimizer = geoopt.optim.RiemannianAdam([point], lr=1e-2)
    target = gaussian(*point.shape, seed=4)
    for _ in range(10):
        optimizer.zero_grad()
        ((point - target) ** 2).sum().backward()
        optimizer.step()
    first, second = product.unpack_tensor(point.detach())
    assert max(ours.constraint_error(first)) < 1e-13  # float64
    assert float(second.norm()) == pytest.approx(1, abs=1e-13)


def sphere_point():
    z = gaussian(4, seed=3)
    return z / z.norm()


@choices
def test_copies_pickles_and_states_keep_every_choice(options):
    class Layer(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.manifold = RestrictedStiefel(gaussian(8, 2, seed=seed), **options)
            self.weight = parameter(self.manifold, 8, 3)

    layer = Layer(0)
    for twin in (copy.deepcopy(layer), copy.deepcopy(layer).double().float().double()):
        assert twin.weight.manifold is twin.manifold
        assert repr(twin.manifold) == repr(layer.manifold)
        assert twin.manifold.reversible == layer.manifold.reversible
    manifold = pickle.loads(pickle.dumps(layer.manifold))
    x = layer.weight.detach()
    u = layer.manifold.proju(x, gaussian(8, 3, seed=5))
    torch.testing.assert_close(manifold.retr_transp(x, u, u), layer.manifold.retr_transp(x, u, u), rtol=0, atol=0)
    file, other = io.BytesIO(), Layer(7)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.manifold.complement, layer.manifold.complement, rtol=0, atol=0)
    assert other.manifold.check_point_on_manifold(other.weight)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.manifold.complement.dtype == torch.float64


@choices
def test_a_stack_steps_like_its_members(options):
    members = [RestrictedStiefel(gaussian(14, k, seed=k) if k else None, **options) for k in (3, 0, 7)]
    stacked = RestrictedStiefel.stack(members)
    assert stacked.complement.shape == (3, 14, 7)
    assert repr(stacked).replace("protected=7", "") == repr(members[2]).replace("protected=7", "")
    xs = [
        m.random(14, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, m in enumerate(members)
    ]
    x, g = torch.stack([x.as_subclass(torch.Tensor) for x in xs]), gaussian(3, 14, 4, seed=8)
    u = 0.2 * stacked.egrad2rgrad(x, g)
    y, v = stacked.retr_transp(x, u, u)
    length = stacked.dist(x, y)
    for i, member in enumerate(members):
        torch.testing.assert_close(0.2 * member.egrad2rgrad(x[i], g[i]), u[i], rtol=0, atol=1e-14)  # order of sums
        alone = member.retr_transp(x[i], u[i], u[i])
        torch.testing.assert_close((y[i], v[i]), alone, rtol=0, atol=1e-13)
        torch.testing.assert_close(member.dist(x[i], y[i]), length[i], rtol=0, atol=1e-11)  # of the logarithm


def test_a_batch_of_complements_takes_a_batch_of_points():
    stacked = RestrictedStiefel.stack([RestrictedStiefel(gaussian(8, 2)), RestrictedStiefel(gaussian(8, 3))])
    assert stacked.random(2, 8, 3).shape == (2, 8, 3)
    assert stacked.random(5, 2, 8, 3).shape == (5, 2, 8, 3)
    for size in ((8, 3), (3, 8, 3)):
        with pytest.raises(ValueError, match=r"\(2,\), got points of shape"):
            stacked.random(*size)


def test_a_stack_of_free_manifolds_is_free():
    assert RestrictedStiefel.stack([RestrictedStiefel(), RestrictedStiefel()]).complement is None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (list, "one or more manifolds"),
        (lambda: [RestrictedStiefel(), RestrictedStiefel(metric="canonical")], "same retraction, metric and transport"),
        (lambda: [RestrictedStiefel(gaussian(8, 2)), RestrictedStiefel(gaussian(9, 2))], r"\(8, 2\) on cpu, \(9, 2\)"),
        (lambda: [RestrictedStiefel(gaussian(3, 8, 2))], r"stacks complements \(n, k\)"),
    ],
)
def test_what_does_not_stack_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        RestrictedStiefel.stack(make())
    with pytest.raises(TypeError, match="RestrictedStiefel, got Tensor"):
        RestrictedStiefel.stack([RestrictedStiefel(), gaussian(8, 2)])


def unchecked(method):
    """The function without the tests' shape checker, which would speak first."""
    function = getattr(method, "__func__", method)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_points_and_complements_of_another_kind_are_refused_by_name(dtype):
    manifold = RestrictedStiefel(gaussian(8, 2))
    x = torch.eye(8, 3).to(dtype)
    for verb in ("projx", "proju", "egrad2rgrad", "retr", "expmap", "retr_transp"):
        method = getattr(RestrictedStiefel, verb)
        arguments = (x,) * {"projx": 1, "retr_transp": 3}.get(verb, 2)
        with pytest.raises(TypeError, match=f"real and kept in float32 or float64, got {dtype}"):
            unchecked(method)(manifold, *arguments)
    with pytest.raises(TypeError, match=f"float32 or float64, got {dtype}"):
        RestrictedStiefel(x)
    ok, reason = manifold.check_point_on_manifold(x, explain=True)
    assert not ok
    assert f"got {dtype}" in reason


def test_values_that_are_not_finite_are_refused_where_they_are_read():
    manifold = RestrictedStiefel(gaussian(8, 2))
    broken = torch.full((8, 3), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shape \(8, 3\) holds NaN or infinite values"):
        manifold.projx(broken)
    with pytest.raises(ValueError, match="the complement holds NaN or infinite values"):
        RestrictedStiefel(broken)
    assert not manifold.check_point_on_manifold(broken)
    assert bool(manifold.retr(broken, broken).isnan().all())  # passes through


def test_a_retraction_that_changes_the_shape_is_named():
    def transposed(x, u):
        return (x + u).mT

    manifold = RestrictedStiefel(gaussian(8, 2), retraction=transposed)
    x = manifold.random(8, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
    with pytest.raises(ValueError, match=r"'transposed' returned shape \(3, 8\) for a step of shape \(8, 3\)"):
        manifold.retr(x, torch.zeros_like(x))


def test_geoopts_checks_find_points_off_the_manifold_for_every_retraction():
    for name in sorted(RETRACTIONS):
        manifold = RestrictedStiefel(gaussian(8, 2), retraction=name)
        x = manifold.random(8, 3, generator=torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
        manifold.assert_check_point_on_manifold(x)
        with pytest.raises(ValueError, match="exceeds"):
            manifold.assert_check_point_on_manifold(x + 0.1)
        with pytest.raises(ValueError, match="exceeds"):
            manifold.assert_check_vector_on_tangent(x, x)


@choices
def test_the_last_room_is_counted(options):
    with pytest.raises(ValueError, match=r"leaves 2 free directions in R\^8, too few for rank 3"):
        RestrictedStiefel(gaussian(8, 6), **options).random(8, 3)
    assert RestrictedStiefel(gaussian(8, 6), **options).random(8, 2).shape == (8, 2)
