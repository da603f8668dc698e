"""The protected subspace: growth by energy, orthonormality, capacity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_cl import ProtectedSubspace


def directions(n, sigma, seed=0):
    """Columns (n, len(sigma)) with the given singular values."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(n, len(sigma), dtype=torch.float64, generator=draw))[0]
    v = torch.linalg.qr(torch.randn(len(sigma), len(sigma), dtype=torch.float64, generator=draw))[0]
    return u * torch.tensor(sigma, dtype=torch.float64) @ v


def off(basis):
    basis = basis.double()
    return float((basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max())


def test_the_column_that_crosses_the_threshold_is_kept():
    # Energies 9, 4, 1, 0.25 of 14.25: 0.632, 0.912, 0.982. The rule of GPM would stop at 2 for 0.97.
    a = directions(10, [3.0, 2.0, 1.0, 0.5])
    assert [ProtectedSubspace.from_directions(a, energy=e).k for e in (0.6, 0.9, 0.97, 0.99, 1.0)] == [1, 2, 3, 4, 4]


def test_growth_counts_what_is_held_already():
    a, b = directions(12, [3.0, 2.0], seed=1), directions(12, [3.0, 2.0], seed=2)
    held = ProtectedSubspace.from_directions(a)
    assert held.extended(a, energy=1.0) is held
    grown = held.extended(b, energy=0.95)
    assert torch.equal(grown.basis[:, : held.k], held.basis)
    assert grown.energy_fraction(b.to(grown.basis)) >= 0.95 - 1e-12


@given(st.integers(3, 20), st.integers(1, 25), st.floats(0.05, 1.0), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_threshold_is_reached_and_the_basis_orthonormal(n, count, energy, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, count, dtype=torch.float64, generator=draw) for _ in range(2))
    grown = ProtectedSubspace.from_directions(a, energy=energy).extended(b, energy=energy)
    assert grown.energy_fraction(b) >= energy - 1e-11  # a float64 sum of squares
    assert off(grown.basis) < 1e-13
    by_moment = ProtectedSubspace.from_directions(a, energy=energy).extended_to_moment(b @ b.T, energy=energy)
    assert by_moment.energy_fraction(b) >= energy - 1e-11


def test_directions_and_their_moment_span_the_same():
    a = directions(15, [5.0, 3.0, 1.0, 0.1])
    one = ProtectedSubspace.from_directions(a, energy=0.99)
    other = ProtectedSubspace.empty(15, dtype=torch.float64).extended_to_moment(a @ a.T, energy=0.99)
    assert one.k == other.k
    # The moment squares the condition, 50² here.
    torch.testing.assert_close(one.project(a), other.project(a), rtol=0, atol=1e-12)


@given(st.integers(3, 20), st.floats(0.05, 0.999), st.integers(0, 10**6), st.sampled_from(["inclusive", "exclusive"]))
@settings(max_examples=60, deadline=None)
def test_few_directions_grow_the_same_subspace_through_their_gram_matrix(n, energy, seed, rule):
    draw = torch.Generator().manual_seed(seed)
    old = ProtectedSubspace.from_directions(torch.randn(n, n // 3, dtype=torch.float64, generator=draw))
    a = torch.randn(n, max(1, n // 2), dtype=torch.float64, generator=draw)
    expected = old.extended(a, energy=energy, threshold_rule=rule)
    found = old.extended_to_few(a, energy=energy, threshold_rule=rule)
    assert found.k == expected.k
    assert off(found.basis) < 1e-13
    # Eigenvectors of neighbouring energies are as exact as their distance allows: 1e-16 over a relative 1e-6.
    torch.testing.assert_close(found.project(a), expected.project(a), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_directions_reach_the_energy_in_every_precision(dtype):
    """Energies fall over six decades: a Gram matrix in float32 would lose the last two."""
    draw = torch.Generator().manual_seed(0)
    a = (torch.randn(64, 30, generator=draw) * torch.logspace(0, -3, 30)).to(dtype)
    for energy in (0.9, 0.9999, 1.0):
        expected = ProtectedSubspace.empty(64).extended(a, energy=energy)
        found = ProtectedSubspace.empty(64).extended_to_few(a, energy=energy)
        assert found.k == expected.k
        assert found.basis.dtype == torch.float32
        torch.testing.assert_close(found.project(a.float()), expected.project(a.float()), rtol=0, atol=1e-6)
    assert found.k == 30


def test_few_directions_are_of_the_space_and_finite():
    held = ProtectedSubspace.empty(4)
    with pytest.raises(ValueError, match="must have 4 rows, got shape \\(3, 2\\)"):
        held.extended_to_few(torch.ones(3, 2), energy=0.9)
    with pytest.raises(ValueError, match="NaN"):
        held.extended_to_few(torch.full((4, 1), torch.nan), energy=0.9)
    assert held.extended_to_few(torch.zeros(4, 2), energy=0.9).k == 0


def test_orthonormality_survives_fifty_growths_in_float32():
    draw = torch.Generator().manual_seed(0)
    held = ProtectedSubspace.empty(200)
    for _ in range(50):
        # Directions almost inside what is held: the case in which one orthogonalisation is not enough.
        inside = held.project(torch.randn(200, 3, generator=draw)) if held.k else torch.zeros(200, 3)
        held = held.extended(inside + 1e-3 * torch.randn(200, 3, generator=draw), energy=1.0)
    assert held.k == 150
    assert off(held.basis) < 1e-6  # float32 storage of a float64 basis


def test_projections_split_a_vector():
    draw = torch.Generator().manual_seed(0)
    held = ProtectedSubspace.from_directions(torch.randn(9, 3, dtype=torch.float64, generator=draw))
    x = torch.randn(9, 2, dtype=torch.float64, generator=draw)
    torch.testing.assert_close(held.project(x) + held.project_out(x), x, rtol=0, atol=1e-15)
    assert held.energy_fraction(held.project(x)) == pytest.approx(1.0, abs=1e-14)
    assert held.energy_fraction(torch.zeros(9, 1, dtype=torch.float64)) == 0.0


def test_capacity_counts_the_room_beside_an_adapter():
    held = ProtectedSubspace.from_directions(directions(10, [1.0, 1.0, 1.0]))
    assert held.capacity(4) == 3
    assert held.capacity(9) == 0


def test_nothing_to_protect_adds_nothing():
    empty = ProtectedSubspace.empty(6)
    assert empty.extended(torch.zeros(6, 4), energy=0.9).k == 0
    assert empty.extended_to_moment(torch.zeros(6, 6), energy=0.9).k == 0


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ProtectedSubspace(torch.eye(3).half()), TypeError, "float32 or float64, got torch.float16"),
        (lambda: ProtectedSubspace(torch.zeros(2, 3, 1)), ValueError, "one matrix"),
        (lambda: ProtectedSubspace.empty(4).extended(torch.ones(5, 2)), ValueError, "must have 4 rows"),
        (lambda: ProtectedSubspace.empty(4).extended(torch.ones(4, 2), energy=1.5), ValueError, r"\(0, 1\], got 1.5"),
        (lambda: ProtectedSubspace.empty(4).extended(torch.full((4, 2), torch.nan)), ValueError, "NaN or infinite"),
        (lambda: ProtectedSubspace.empty(4).extended_to_moment(torch.ones(3, 3), energy=0.5), ValueError, r"\(4, 4\)"),
        (lambda: ProtectedSubspace.from_directions(torch.ones(4, 2), energy=0.5, rank=1), ValueError, "not both"),
    ],
)
def test_wrong_input_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_float32_moment_of_low_rank_adds_no_rounding_directions():
    a = directions(10, [3.0, 2.0, 1.0, 0.5]).float()
    assert ProtectedSubspace.empty(10).extended_to_moment(a @ a.T, energy=1.0).k == 4


def test_no_columns_can_be_added_but_not_fewer():
    a = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    assert ProtectedSubspace.from_directions(a, rank=0).k == 0
    with pytest.raises(ValueError, match="rank, the number of columns to add, must be at least 0, got -1"):
        ProtectedSubspace.from_directions(a, rank=-1)


def test_an_unknown_threshold_rule_is_refused_wherever_it_enters():
    # Not through the tests' type checker, which would speak first.
    subspace, directions = ProtectedSubspace.empty(6), torch.eye(6, 2)
    for method, argument in (
        (ProtectedSubspace.extended, directions),
        (ProtectedSubspace.extended_to_moment, torch.eye(6)),
    ):
        with pytest.raises(ValueError, match="'inclusive', 'exclusive', got 'dropt'"):
            getattr(method, "__wrapped__", method)(subspace, argument, energy=0.9, threshold_rule="dropt")
