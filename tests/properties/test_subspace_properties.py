"""Laws of protected subspaces: growth is monotone, enough and no more than enough; projections split a vector."""

import pytest
import torch
from hypothesis import strategies as st
from property_cases import EPS, cases, close, holds_for

from manifold_cl import ProtectedSubspace, RestrictedStiefel

energies = st.sampled_from([0.1, 0.5, 0.9, 0.97, 0.999, 1.0])
rules = st.sampled_from(["inclusive", "exclusive"])
ways = st.sampled_from(["extended", "extended_to_moment", "extended_to_few"])
sizes = st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e12])
one = cases(batches=((),))


def subspace(case):
    return ProtectedSubspace.empty(case.n, dtype=case.dtype) if case.k == 0 else ProtectedSubspace(case.bases())


def directions(case, size=1.0):
    """Directions of falling lengths; as many as the points of the case have columns, at least one more than that."""
    count = case.p + 1
    return size * case.gaussian(case.n, count) * torch.logspace(0, -2, count, dtype=case.dtype)


def grow(held, way, a, **options):
    if way == "extended_to_moment":
        return held.extended_to_moment((a.double() @ a.double().mT), **options)
    return getattr(held, way)(a, **options)


@holds_for(case=one, energy=energies, way=ways, size=sizes, rule=rules)
def test_growth_keeps_the_old_columns_and_reaches_its_threshold(case, energy, way, size, rule):
    held, a = subspace(case), directions(case, size)
    grown = grow(held, way, a, energy=energy, threshold_rule=rule)
    assert held.k <= grown.k <= case.n
    assert torch.equal(grown.basis[:, : held.k], held.basis)
    assert grown.basis.dtype == case.dtype
    gram = grown.basis.double().mT @ grown.basis.double()
    close(gram, torch.eye(grown.k).double(), 40 * EPS[case.dtype])
    if rule == "inclusive" or held.k:
        assert grown.energy_fraction(a.double().to(case.dtype)) >= energy - 1e-5
    if grown.k > held.k + 1 and rule == "inclusive":  # one column less would not reach it
        fewer = ProtectedSubspace(grown.basis[:, :-1])
        assert fewer.energy_fraction(a) < energy + 1e-5


@holds_for(case=one, energy=energies, way=ways, size=sizes)
def test_growth_by_the_same_directions_adds_nothing(case, energy, way, size):
    a = directions(case, size)
    once = grow(subspace(case), way, a, energy=energy)
    # Float32 columns hold the energy to their rounding only.
    again = grow(once, way, a, energy=energy * (1 - 1e-5))
    assert again.k == once.k


@holds_for(case=one, energy=energies, size=sizes)
def test_growth_does_not_depend_on_scale_or_on_the_mixing_of_directions(case, energy, size):
    held, a = subspace(case), directions(case)
    base = held.extended(a, energy=energy * 0.9999)
    mixed = (size * a.double() @ case.orthogonal(a.shape[1])).to(case.dtype)
    other = held.extended(mixed, energy=energy * 0.9999)
    assert other.k == base.k
    bound = 1e-2 if case.dtype == torch.float32 else 1e-8  # of the smallest gap between the lengths, squared
    if energy == 1.0:  # else a near tie may choose another direction of the same energy
        close(other.basis @ other.basis.mT, base.basis @ base.basis.mT, bound)


@holds_for(case=cases(batches=((),), dtypes=(torch.float64,)), energy=energies)
def test_three_ways_to_grow_agree(case, energy):
    held, a = subspace(case), directions(case)
    found = [
        grow(held, way, a, energy=energy * 0.9999) for way in ("extended", "extended_to_moment", "extended_to_few")
    ]
    assert len({each.k for each in found}) == 1
    for each in found[1:]:
        close(each.basis @ each.basis.mT, found[0].basis @ found[0].basis.mT, 1e-6)  # moments square the gaps


@holds_for(case=one, energy=energies)
def test_a_higher_threshold_never_protects_less(case, energy):
    held, a = subspace(case), directions(case)
    less, more = (held.extended(a, energy=share) for share in (energy * 0.8, energy))
    assert held.k <= less.k <= more.k
    inside = more.project_out(less.basis)
    assert float(inside.abs().max() if inside.numel() else 0) <= 100 * EPS[case.dtype]


@holds_for(case=one, rank=st.integers(0, 20))
def test_growth_by_a_number_adds_that_many_or_all(case, rank):
    held, a = subspace(case), directions(case)
    grown = held.extended(a, rank=rank)
    assert grown.k == held.k + min(rank, a.shape[1], case.n - held.k)


@holds_for(case=one, size=sizes)
def test_a_projection_splits_a_vector(case, size):
    held = subspace(case)
    x = size * case.gaussian(2, case.n, 3)
    inside, outside = held.project(x), held.project_out(x)
    bound = 40 * EPS[case.dtype] * size * case.n
    close(inside + outside, x, bound)
    close(held.project(inside), inside, bound)
    close(held.project_out(outside), outside, bound)
    close(held.project_out(inside), torch.zeros_like(x), bound)
    share = held.energy_fraction(x)
    assert -1e-6 <= share <= 1 + 1e-5
    assert held.energy_fraction(3.0 * x) == pytest.approx(share, abs=1e-5)
    assert ProtectedSubspace.empty(case.n).energy_fraction(x.float()) == 0


@holds_for(case=one)
def test_capacity_is_the_number_of_directions_that_leave_room_for_points(case):
    held = subspace(case)
    room = held.capacity(case.p)
    assert room == RestrictedStiefel(held).capacity(case.p) == case.n - held.k - case.p
    full = held.extended(case.gaussian(case.n, case.n + 1), rank=room)
    RestrictedStiefel(full).random(case.n, case.p)
    over = full.extended(case.gaussian(case.n, case.n + 1), rank=1)
    with pytest.raises(ValueError, match=f"leaves {case.p - 1} free directions"):
        RestrictedStiefel(over).random(case.n, case.p)


@holds_for(40, case=cases(batches=((),), dtypes=(torch.float32,)))
def test_compact_bases_keep_their_columns_when_they_grow(case):
    held = subspace(case).compacted()
    grown = held.extended(directions(case), energy=0.9)
    compact = grown.compacted(held)
    assert torch.equal(compact.basis[:, : held.k], held.basis)
    assert torch.equal(ProtectedSubspace.from_packed(compact.packed, case.n).basis, compact.basis)


@holds_for(case=one, wrong=st.sampled_from(["nan", "inf", "rows", "energy", "rank", "both", "half", "skew"]))
def test_wrong_input_is_refused(case, wrong):
    held, a = subspace(case), directions(case)
    if wrong in ("nan", "inf"):
        a[0, 0] = float(wrong)
        with pytest.raises(ValueError, match="NaN or infinite"):
            held.extended(a)
        with pytest.raises(ValueError, match="NaN or infinite"):
            held.extended_to_few(a, energy=0.9)
    elif wrong == "rows":
        with pytest.raises(ValueError, match=rf"must have {case.n} rows, got shape \({case.n + 1}, 2\)"):
            held.extended(case.gaussian(case.n + 1, 2))
    elif wrong == "energy":
        for energy in (0.0, -0.5, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"a share in \(0, 1\]"):
                held.extended(a, energy=energy)
    elif wrong == "rank":
        with pytest.raises(ValueError, match="at least 0, got -1"):
            held.extended(a, rank=-1)
    elif wrong == "both":
        with pytest.raises(ValueError, match="not both"):
            ProtectedSubspace.from_directions(a, energy=0.5, rank=1)
    elif wrong == "half":
        with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
            ProtectedSubspace(held.basis.bfloat16())
    else:
        with pytest.raises(ValueError, match="not orthonormal"):
            ProtectedSubspace(2 * torch.eye(case.n)[:, :1])
