"""Laws that every registered step without a retraction obeys; a new one is tested by being registered."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from manifold_cl import RestrictedStiefel
from manifold_cl.infeasible import INFEASIBLE_STEPS, Landing, as_infeasible_step, newton_direction

names = pytest.mark.parametrize("name", sorted(INFEASIBLE_STEPS))
LENGTHS = torch.tensor([0.1, 0.05, 0.025, 0.0125], dtype=torch.float64)


def problem(*, n: int = 20, p: int = 4, k: int = 5, batch: tuple[int, ...] = (), seed: int = 0):
    """A manifold, a point on it, and a displacement of length 1 that is neither tangent nor off F."""
    draw = torch.Generator().manual_seed(seed)
    space = RestrictedStiefel(torch.randn(n, k, dtype=torch.float64, generator=draw))
    x = space.random(*batch, n, p, generator=draw).as_subclass(Tensor)
    d = space._project_out(torch.randn(*batch, n, p, dtype=torch.float64, generator=draw))
    return space, x, d / d.norm()


def slope(errors: list[float]) -> float:
    return math.log(errors[0] / errors[-1]) / math.log(float(LENGTHS[0] / LENGTHS[-1]))


def error_of(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).max())


@names
@pytest.mark.parametrize(("n", "p", "k"), [(20, 4, 5), (20, 4, 0), (12, 4, 8), (9, 1, 3)])
def test_the_constraint_error_has_the_declared_order_in_the_length_of_the_step(name, n, p, k):
    step, (_, x, d) = INFEASIBLE_STEPS[name], problem(n=n, p=p, k=k)
    if n - k == p:
        d = RestrictedStiefel().proju(x, d)
    errors = [error_of(step(x, t * d, lr=0.1)) for t in LENGTHS]
    assert slope(errors) == pytest.approx(step.order, abs=0.05)  # steps of 0.1 leave a part in a hundred


@names
def test_a_step_starts_at_the_point_is_differentiable_there_and_goes_along_the_displacement(name):
    step, (space, x, d) = INFEASIBLE_STEPS[name], problem()
    d = space.proju(x, d)
    assert float((step(x, 0 * d, lr=0.1) - x).abs().max()) < 1e-14
    bends = [float((step(x, t * d, lr=0.1) - 2 * step(x, t / 2 * d, lr=0.1) + x).norm()) for t in LENGTHS]
    assert bends[-1] <= bends[0] / 60 + 1e-14  # a slope of 2 divides by 64; two steps are linear in d
    moved = (step(x, 1e-6 * d, lr=0.1) - x) / 1e-6
    assert float(2 * (x.mT @ moved + moved.mT @ x).abs().max()) < 1e-5  # tangent, up to the square of the length
    assert 0.5 - 1e-5 <= float((moved * d).sum() / d.square().sum()) <= 1 + 1e-5


@names
def test_the_normal_part_of_a_displacement_does_not_move_a_point_to_first_order(name):
    step, (_, x, _) = INFEASIBLE_STEPS[name], problem()
    s = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float((step(x, x @ (s + s.mT), lr=0.1) - x).abs().max()) < 1e-13


@names
def test_a_batch_takes_the_steps_of_its_members(name):
    step, (_, x, d) = INFEASIBLE_STEPS[name], problem(batch=(2, 3))
    y = step(x, d, lr=0.1)
    # The same arithmetic in another order.
    torch.testing.assert_close(y[1, 2], step(x[1, 2], d[1, 2], lr=0.1), rtol=0, atol=1e-14)


@names
def test_steps_of_length_zero_return_to_the_manifold(name):
    step, (space, x, d) = INFEASIBLE_STEPS[name], problem()
    x, nearest = x + 0.1 * d, space.projx(x + 0.1 * d)
    before = error_of(x)
    for _ in range(400):  # landing at rate 0.1 takes a fifth of the deviation off per step
        x = step(x, torch.zeros_like(x), lr=0.1)
    assert before > 0.05
    assert error_of(x) < 1e-12
    torch.testing.assert_close(x, nearest, rtol=0, atol=1e-12)  # every normal step keeps the polar factor


@names
@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_float32_steps_stay_near_the_manifold_and_exactly_off_the_protected_directions(name, steps):
    draw = torch.Generator().manual_seed(0)
    space = RestrictedStiefel(torch.randn(64, 16, generator=draw))
    x, step, length = space.random(64, 8, generator=draw).as_subclass(Tensor), INFEASIBLE_STEPS[name], 0.1
    worst = 0.0
    for i in range(steps):
        d = space._project_out(torch.randn(64, 8, generator=draw))
        x = space._project_out(step(x, length * d / d.norm(), lr=0.1))
        worst = max(worst, error_of(x)) if i % 10 == 9 else worst
    assert space.constraint_error(x).protection <= 2e-6
    # One step adds |u|^order. Landing takes 2 η λ = 1/5 of the deviation off per step: five steps' worth remain.
    assert worst <= {"landing": 5 * length**2, "second_order_landing": 1.1 * length**2}.get(name, 1e-5)


def test_landing_stays_in_its_safe_region_at_any_rate():
    _, x, d = problem()
    for rate in (0.1, 1.0, 100.0):
        y, far = x, 0.0
        for _ in range(50):
            y = Landing()(y, rate * d, lr=rate)
            far = max(far, error_of(y))
        assert far <= 0.5 + 1e-12
    outside = 1.5 * x
    assert error_of(outside) > 0.5
    assert error_of(Landing()(outside, d, lr=0.1)) < error_of(outside)


def dense_reference(name: str, x: Tensor, d: Tensor, lr: float) -> Tensor:
    """The published formulas with n × n matrices: the field ``skew(G xᵀ) x`` for the gradient ``G = −d / lr``."""
    n, p = x.shape
    eye, relative = torch.eye(p, dtype=x.dtype), d @ x.T
    turned = (relative - relative.T) / 2 @ x
    if name == "landing":
        return x + turned - lr * x @ (x.T @ x - eye)
    if name == "pogo":
        middle = x + turned
        return 1.5 * middle - 0.5 * middle @ middle.T @ middle
    # The orthogonal projection onto the kernel of u -> xᵀu + uᵀx, by a basis of symmetric matrices.
    pairs = [(i, j) for i in range(p) for j in range(i + 1)]
    normals = []
    for i, j in pairs:
        s = torch.zeros_like(eye)
        s[i, j] = s[j, i] = 1
        normals.append((x @ s).flatten())
    q = torch.linalg.qr(torch.stack(normals, dim=1))[0]
    level = (d.flatten() - q @ (q.T @ d.flatten())).reshape(n, p)
    return x + level + x @ (eye - x.T @ x) / 2


@pytest.mark.parametrize("name", ["landing", "pogo", "second_order_landing"])
def test_own_steps_equal_their_published_formulas_off_the_manifold_too(name):
    _, x, d = problem(k=0)
    x = x + 0.05 * d.roll(1, 0)
    expected = dense_reference(name, x, 0.02 * d, 0.1)
    torch.testing.assert_close(INFEASIBLE_STEPS[name](x, 0.02 * d, lr=0.1), expected, rtol=0, atol=1e-13)


def test_pogo_takes_the_steps_of_its_authors_package():
    pytest.importorskip("pogo.base")
    import pogo

    _, x, _ = problem(k=0, batch=(3,))
    target = torch.randn(3, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    theirs = torch.nn.Parameter(x.clone())
    optimizer = pogo.POGO([theirs], pogo.base.SGD(momentum=0.9), lr=0.1, rows=False, check_size=False)
    buffer = torch.zeros_like(x)
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * (theirs - target).square().sum()).backward()
        buffer = 0.9 * buffer + (x - target) if buffer.any() else 1.9 * (x - target)  # theirs counts the first twice
        optimizer.step()
        x = INFEASIBLE_STEPS["pogo"](x, -0.1 * buffer, lr=0.1)
        torch.testing.assert_close(theirs.detach(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_second_order_landing_converges_quadratically_with_newtons_direction(k):
    space, x, d = problem(k=k)
    draw = torch.Generator().manual_seed(3)
    a = torch.diag(1 + 0.3 * torch.rand(20, dtype=torch.float64, generator=draw))
    b = a @ space.random(20, 4, generator=draw).as_subclass(Tensor)

    def gradient(y: Tensor) -> Tensor:
        return space._project_out(a @ (a @ y - b))

    x, step = space.projx(b), INFEASIBLE_STEPS["second_order_landing"]
    x = x + 0.02 * d
    residuals = []
    for _ in range(6):
        u = newton_direction(x, gradient(x), lambda v: space._project_out(a @ (a @ v)), complement=space.complement)
        residuals.append(float(space.proju(x, gradient(x)).norm()) + error_of(x))
        x = step(x, u, lr=1.0)
    falling = [r for r in residuals if r > 1e-12]
    assert residuals[-1] < 1e-13
    for before, after in itertools.pairwise(falling):
        assert after < 10 * before**2
    assert space.constraint_error(x).protection < 1e-15


def test_the_newton_direction_goes_downhill_where_curvature_is_negative():
    space, x, _ = problem()
    g = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    u = newton_direction(x, g, lambda v: -100 * v, complement=space.complement)
    torch.testing.assert_close(u, -space.proju(x, g), rtol=0, atol=1e-13)


# Bad input ------------------------------------------------------------------------------------------


def leaking(x, d, lr):
    return x + d + 1e-3 * d.norm() * torch.ones_like(x)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        ("pogoo", ValueError, "'pogoo', did you mean pogo"),
        (3, TypeError, "int"),
        (leaking, ValueError, r"'leaking' leaves the complement: max\|Fᵀy\| = \d\.\de-0"),
        (lambda x, d, lr: x[:-1], ValueError, r"\(11, 3\) for \(12, 3\)"),
        (lambda x, d, lr: 1.01 * x + d, ValueError, "moves a point by"),
    ],
)
def test_what_is_no_step_is_refused_by_name_with_its_numbers(step, error, message):
    with pytest.raises(error, match=message):
        as_infeasible_step(step)


@pytest.mark.parametrize("options", [{"attraction": 0.0}, {"radius": 1.0}, {"radius": 0.0}])
def test_landing_refuses_impossible_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Landing(**options)
