"""Points that step together: the same numbers as one by one, on memory that is there already."""

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Net, train

from manifold_cl import RestrictedStiefel, RiemannianAdamW, RiemannianSGD, param_groups
from manifold_cl.optim import polar
from manifold_cl.optim.buckets import SLAB, Bucket, ManifoldGeometry, Member, bucketed
from manifold_cl.optim.polar import PolarGeometry, Workspace, rest_of


def members(widths, draw, *, n=40, p=3, dtype=torch.float32, **options):
    found = []
    for k in widths:
        basis = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=draw))[0].to(dtype)
        manifold = RestrictedStiefel(basis if k else None, **options)
        point = manifold.random(n, p, dtype=dtype, generator=draw).detach()
        found.append(Member(torch.nn.Parameter(point.as_subclass(torch.Tensor)), manifold))
    return found


def geometries(members):
    """The fast geometry of a bucket of these members, and that by the manifold's own methods."""
    stacked = RestrictedStiefel.stack([member.manifold for member in members])
    return Bucket(members, Workspace()).geometry, ManifoldGeometry(stacked)


def stepped(geometry, x, g, d, *, vectors=()):
    gradient, y, carried = g.clone(), d.clone(), [v.clone() for v in vectors]
    geometry.gradient_(x, gradient)
    geometry.retract_(x, y, carried, off_complement=False)
    return gradient, y, carried


@pytest.mark.parametrize("own_basis", [1, 1 << 30], ids=["one by one", "stacked"])
@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_working_in_place_gives_the_bits_of_the_manifolds_own_verbs(metric, own_basis, generator, monkeypatch):
    monkeypatch.setattr(polar, "OWN_BASIS", own_basis)
    group = members((130, 134, 131), generator, n=384, p=16, metric=metric, retraction="polar")
    x = torch.stack([member.parameter.detach() for member in group])
    g, d, v = (0.1 * torch.randn(x.shape, generator=generator) for _ in range(3))
    fast, slow = geometries(group)
    assert isinstance(fast, PolarGeometry)
    assert bool(fast.projector.bases) == (own_basis == 1)
    for a, b in zip(stepped(fast, x, g, d)[:2], stepped(slow, x, g, d)[:2], strict=True):
        assert torch.equal(a, b)
    one, other = (stepped(geometry, x, g, d, vectors=[v])[2][0] for geometry in (fast, slow))
    torch.testing.assert_close(one, other, rtol=0, atol=5e-6)  # one more float32 projection in the slow form
    assert float((x - slow.manifold.projx(x)).abs().max()) < 1e-6  # x is untouched


def test_a_nearly_full_complement_is_replaced_by_its_own_complement(generator, monkeypatch):
    group = members((33, 35), generator, dtype=torch.float64)
    x = torch.stack([member.parameter.detach() for member in group])
    g, d = (torch.randn(x.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    dual, _ = geometries(group)
    assert dual.projector.dual
    assert dual.projector.stacked.shape == (2, 40, 7)
    monkeypatch.setattr(polar, "DUAL", 2.0)
    plain, _ = geometries(group)
    assert not plain.projector.dual
    for a, b in zip(stepped(dual, x, g, d)[:2], stepped(plain, x, g, d)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # float64 rounding


def test_the_rest_of_a_padded_basis_ignores_the_padding(generator):
    basis = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64, generator=generator))[0]
    padded = torch.cat([basis, torch.zeros(9, 2, dtype=torch.float64)], dim=1)
    rest = rest_of(padded)
    assert rest.shape == (9, 5)
    assert float((basis.T @ rest).abs().max()) < 1e-15  # float64 rounding
    torch.testing.assert_close(rest.T @ rest, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)  # the same


def test_a_large_complement_is_used_where_it_is(generator, monkeypatch):
    monkeypatch.setattr(polar, "OWN_BASIS", 1)
    (member,) = members((7,), generator)
    geometry, _ = geometries([member])
    assert geometry.projector.stacked is None
    assert geometry.projector.bases[0].data_ptr() == member.manifold.complement.data_ptr()


@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_slabs_change_no_bit(base, monkeypatch):
    ends = []
    for size in (1, 1 << 20):
        monkeypatch.setitem(SLAB, "cpu", size)
        net = Net(k=(6, 6))
        optimizer = (RiemannianAdamW if base == "AdamW" else RiemannianSGD)(param_groups(net, lr=1e-2))
        train(net, optimizer, 5)
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_widths_of_one_size_class_share_a_bucket_and_others_do_not(generator):
    group = members((0, 5, 5, 20, 21, 38), generator, n=64)
    slabs = bucketed(group)
    assert [[member.manifold.width for member in slab] for slab in slabs] == [[0], [5, 5], [20], [21], [38]]
    assert all(PolarGeometry.fits(*slab[0]) for slab in slabs)


def test_other_retractions_and_transports_keep_the_manifolds_own_verbs(generator):
    for options in ({"retraction": "qr"}, {"transport": "isometric", "retraction": "cayley"}):
        (member,) = members((5,), generator, **options)
        assert not PolarGeometry.fits(*member)
    sphere = geoopt.Sphere()
    assert not PolarGeometry.fits(torch.nn.Parameter(torch.ones(3)), sphere)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 24),
    data=st.data(),
    base=st.sampled_from([RiemannianAdamW, RiemannianSGD]),
    moments=st.sampled_from(["ambient", "transport"]),
    metric_pre=st.sampled_from(["none", "euclidean", "canonical"]),
)
def test_the_constraint_holds_for_every_shape_up_to_a_full_space(n, data, base, moments, metric_pre):
    p = data.draw(st.integers(1, n))
    widths = data.draw(st.lists(st.sampled_from(sorted({0, min(1, n - p), n - p})), min_size=1, max_size=4))
    draw = torch.Generator().manual_seed(n)
    group = members(widths, draw, n=n, p=p)
    optimizer = base(
        [{"params": [m.parameter for m in group], "manifolds": [m.manifold for m in group]}],
        lr=0.05,
        weight_decay=0.0,
        moments=moments,
        metric_pre=metric_pre,
    )
    for _ in range(4):
        for member in group:
            member.parameter.grad = torch.randn(n, p, generator=draw)
        optimizer.step()
    assert max(optimizer.constraint_error()) <= 2e-6  # float32 bound


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("moments", ["ambient", "transport"])
def test_a_gpu_takes_the_same_steps(moments):
    nets = [Net(), Net().cuda()]
    nets[1].x, nets[1].y = nets[0].x.cuda(), nets[0].y.cuda()
    for net in nets:
        train(net, RiemannianAdamW(param_groups(net, lr=1e-2), moments=moments), 5)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        # Float32 in another order; where a gradient is near zero Adam turns its rounding into a step.
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-4)
    assert nets[1].worst() <= 2e-6  # float32 bound


def test_a_step_needs_one_copy_of_the_points_and_scratch_for_a_slab(monkeypatch):
    monkeypatch.setitem(SLAB, "cpu", 4 * 512 * 16 * 4)  # an eighth of the bucket
    draw = torch.Generator().manual_seed(0)
    group = members((64,) * 32, draw, n=512, p=16)
    optimizer = RiemannianAdamW(
        [{"params": [m.parameter for m in group], "manifolds": [m.manifold for m in group]}], weight_decay=0.0
    )
    peaks = []
    for step in range(5):
        for member in group:
            member.parameter.grad = torch.randn(512, 16, generator=draw)
        with torch.profiler.profile(profile_memory=True) as seen:
            optimizer.step()
        held = peak = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        if step:  # the first makes scratch memory and state
            peaks.append(peak)
    points = sum(m.parameter.nbytes for m in group)
    # One copy holds all results until each is known to be finite; complements are not counted.
    assert max(peaks) + optimizer._riemannian.plan.workspace.nbytes <= 1.8 * points
    assert max(peaks) == min(peaks)  # nothing grows
