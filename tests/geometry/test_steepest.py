"""Steepest tangent directions: exactness against a certificate, an iteration of another kind, and random rivals."""

import pytest
import torch
from torch import Tensor

from manifold_cl.geometry import tangent_lmo
from manifold_cl.geometry.steepest import msign

SHAPES = [(512, 8, 64), (384, 16, 150), (64, 16, 40), (64, 16, 33), (64, 15, 48), (64, 15, 49), (20, 1, 3), (9, 9, 0)]
"""(n, p, k): ample room, and n − k < 2p down to n − k = p, where the multiplier of the dual problem is not unique."""


def case(n: int, p: int, k: int, *, decades: float = 2, seed: int = 0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, k + p, dtype=torch.float64, generator=draw))[0]
    g = torch.randn(n, p, dtype=torch.float64, generator=draw) * torch.logspace(0, -decades, p, dtype=torch.float64)
    return q[:, k:].to(dtype), g.to(dtype), q[:, :k].to(dtype)


def unit_tangent(x: Tensor, f: Tensor, a: Tensor) -> Tensor:
    """The tangent part of a off F, of spectral norm 1."""
    a = a - f @ (f.mT @ a)
    a = a - x @ (x.mT @ a + a.mT @ x) / 2
    return a / torch.linalg.matrix_norm(a, 2)


def dual_ascent(x: Tensor, g: Tensor, steps: int) -> tuple[Tensor, float]:
    """The direction of the fixed point of spectral-steps, Lyapunov form, and its objective."""
    s, k = x.mT @ g, g.mT @ g
    multiplier = -(s + s.mT) / 2
    for _ in range(steps):
        m = multiplier @ multiplier + multiplier @ s + s.mT @ multiplier + k
        w, e = torch.linalg.eigh((m + m.mT) / 2)
        b = w.clamp_min(1e-14 * float(w[-1])).rsqrt()
        root = (e * b) @ e.mT
        right = e.mT @ -(s @ root + root @ s.mT) @ e / (b[:, None] + b[None, :])
        multiplier = e @ right @ e.mT
    a = (g + x @ multiplier) @ root
    return a, float((g * a).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decades", [0, 2, 4])
def test_the_spectral_direction_is_exact(shape, decades):
    x, g, f = case(*shape, decades=decades)
    found = tangent_lmo(x, g, complement=f)
    a = found.direction
    assert (x.mT @ a + a.mT @ x).abs().max() <= 1e-10
    assert shape[2] == 0 or (f.mT @ a).abs().max() <= 1e-10
    assert abs(float(torch.linalg.matrix_norm(a, 2)) - 1) <= 1e-8
    assert abs(float(found.gap)) <= 1e-12  # the dual value is attained: nothing is steeper
    assert float(found.value) == pytest.approx(float((g * a).sum()), rel=1e-12)


@pytest.mark.slow
def test_a_thousand_random_problems_are_exact_and_no_rival_is_steeper():
    draw = torch.Generator().manual_seed(7)
    for seed in range(1000):
        p = int(torch.randint(1, 9, (), generator=draw))
        k = int(torch.randint(0, 20, (), generator=draw))
        n = k + p + int(torch.randint(0, 30, (), generator=draw))
        x, g, f = case(n, p, k, decades=float(torch.randint(0, 5, (), generator=draw)), seed=seed)
        found = tangent_lmo(x, g, complement=f)
        off = g - f @ (f.mT @ g)
        rivals = [g, msign(off - x @ (x.mT @ off + off.mT @ x) / 2), torch.randn(n, p, generator=draw).double()]
        assert float(found.tangency) <= 1e-10
        if n - k == p == 1:  # two points, without any tangent
            assert found.direction.abs().max() <= 1e-14
            continue
        assert abs(float(found.gap)) <= 1e-10
        assert float(torch.linalg.matrix_norm(found.direction, 2)) == pytest.approx(1, abs=1e-8)
        for rival in rivals:
            tangent = unit_tangent(x, f, rival)
            assert float((g * tangent).sum()) <= float(found.value) * (1 + 1e-12)


def test_it_agrees_with_an_iteration_on_the_multipliers_where_that_converges():
    x, g, f = case(512, 8, 64)
    a, value = dual_ascent(x, g - f @ (f.mT @ g), steps=14)
    found = tangent_lmo(x, g, complement=f)
    torch.testing.assert_close(found.direction, a, rtol=0, atol=1e-9)
    assert float(found.value) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "blocks"])
def test_directions_ignore_scale_and_follow_the_basis(norm):
    x, g, f = case(40, 5, 6)
    a = tangent_lmo(x, g, norm=norm, complement=f).direction
    for factor in (1e-3, 1e20):
        torch.testing.assert_close(tangent_lmo(x, factor * g, norm=norm, complement=f).direction, a, rtol=0, atol=1e-10)
    o = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    turned = tangent_lmo(x @ o, g @ o, norm=norm, complement=f).direction
    torch.testing.assert_close(turned, a @ o, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "blocks"])
def test_a_batch_equals_its_members(norm):
    pairs = [case(40, 5, 6, seed=seed) for seed in range(3)]
    x, g, f = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    together = tangent_lmo(x, g, norm=norm, complement=f)
    for i, (a, b, c) in enumerate(pairs):
        alone = tangent_lmo(a, b, norm=norm, complement=c)
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(many[i], one, rtol=0, atol=1e-12)


def test_blocks_have_norm_one_each():
    x, g, f = case(60, 6, 10)
    a = tangent_lmo(x, g, norm="blocks", complement=f).direction
    inside = x.mT @ a
    for part in (inside, a - x @ inside):
        assert float(torch.linalg.matrix_norm(part, 2)) == pytest.approx(1, abs=1e-10)
    assert 1 <= float(torch.linalg.matrix_norm(a, 2)) <= 2**0.5 + 1e-12


def test_a_gradient_of_low_rank_moves_nothing_else():
    x, _, f = case(60, 8, 10)
    draw = torch.Generator().manual_seed(3)
    g = torch.randn(60, 2, dtype=torch.float64, generator=draw) @ torch.randn(2, 8, dtype=torch.float64, generator=draw)
    found = tangent_lmo(x, g, complement=f)
    assert abs(float(found.gap)) <= 1e-9
    assert float(torch.linalg.matrix_norm(found.direction, 2)) == pytest.approx(1, abs=1e-8)
    assert int(torch.linalg.matrix_rank(found.direction, rtol=1e-6)) <= 4


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_zero_gradient_gives_a_zero_direction(norm, dtype):
    x, g, f = case(20, 4, 3, dtype=dtype)
    found = tangent_lmo(x, 0 * g, norm=norm, complement=f)
    assert torch.equal(found.direction, 0 * g)
    assert float(found.value) == float(found.gap) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_keeps_its_digits(shape):
    x, g, f = case(*shape, dtype=torch.float32)
    found = tangent_lmo(x, g, complement=f)
    assert float(found.tangency) <= 1e-6
    assert abs(float(torch.linalg.matrix_norm(found.direction, 2)) - 1) <= 2e-6
    assert abs(float(found.gap)) <= 1e-5


def test_spel_without_a_tangent_part_is_another_direction():
    x, g, f = case(40, 5, 6)
    off = g - f @ (f.mT @ g)
    published, shipped = msign(off - x @ (x.mT @ off + off.mT @ x) / 2), msign(off)
    assert (published - shipped).abs().max() > 0.05
    assert (x.mT @ published + published.mT @ x).abs().max() > 1e-3  # neither is tangent


def test_bad_input_is_refused():
    x, g, _ = case(20, 4, 3)
    with pytest.raises(ValueError, match="norm is one of spectral, frobenius, blocks, got 'nuclear'"):
        tangent_lmo(x, g, norm="nuclear")
    with pytest.raises(ValueError, match=r"\(20, 4\) and \(20, 3\)"):
        tangent_lmo(x, g[:, :3])


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_direction(norm, dtype):
    x, _, f = case(2, 1, 1, dtype=dtype)  # no vector is tangent
    assert tangent_lmo(x, x + f, norm=norm, complement=f).direction.abs().max() == 0
    x, g, f = case(20, 3, 5, dtype=dtype)
    assert tangent_lmo(x, f @ (f.mT @ g), norm=norm, complement=f).direction.abs().max() == 0
    assert tangent_lmo(x, x @ (x.mT @ g + g.mT @ x), norm=norm).direction.abs().max() == 0  # a normal gradient
    x, g, f = case(9, 5, 4, decades=0, dtype=dtype)  # no direction is outside the span of x and F
    a = tangent_lmo(x, g, norm=norm, complement=f).direction
    bound = 100 * torch.finfo(dtype).eps
    assert (x.mT @ a + a.mT @ x).abs().max() <= bound
    torch.testing.assert_close(x @ (x.mT @ a), a, rtol=0, atol=bound)


def test_a_nearly_normal_gradient_has_a_tangent_direction():
    x, g, f = case(20, 3, 5)
    near = tangent_lmo(x, x + 1e-9 * g, norm="frobenius", complement=f)  # the division would magnify rounding
    assert near.tangency <= 1e-15
