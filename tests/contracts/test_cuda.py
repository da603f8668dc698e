"""The geometry on a CUDA device: the same numbers as on the CPU, in both precisions, without leaving the device."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from manifold_cl import RETRACTIONS, ProtectedSubspace, RestrictedStiefel, RiemannianAdamW
from manifold_cl.geometry.retractions import NewtonSchulz

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
names = pytest.mark.parametrize("name", sorted(RETRACTIONS))
metrics = pytest.mark.parametrize("metric", ["euclidean", "canonical"])
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance", "tf32"),
    # Sums of a few hundred terms, in another order; products in TF32 would be off by 1e-3.
    [(torch.float64, 1e-12, False), (torch.float32, 2e-6, False), (torch.float32, 2e-6, True)],
)


@contextmanager
def matmul_precision(tf32):
    """Inside, products of float32 outside the library may be computed in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def setting(dtype, **options):
    draw = torch.Generator().manual_seed(0)
    here = RestrictedStiefel(torch.randn(64, 8, dtype=torch.float64, generator=draw), **options)
    there = RestrictedStiefel(here.complement, **options).cuda()
    x = here.random(3, 64, 5, dtype=dtype, generator=draw).as_subclass(torch.Tensor)
    u = here.proju(x, torch.randn(3, 64, 5, dtype=dtype, generator=draw))
    return here, there, x, 0.5 * u / torch.linalg.matrix_norm(u, keepdim=True)


@names
@metrics
@precisions
def test_every_verb_gives_what_the_cpu_gives(name, metric, dtype, tolerance, tf32):
    here, there, x, u = setting(dtype, retraction=name, metric=metric)
    with matmul_precision(tf32):
        for verb in ("retr", "expmap", "egrad2rgrad", "proju", "inner"):
            expected, found = getattr(here, verb)(x, u), getattr(there, verb)(x.cuda(), u.cuda())
            assert found.device.type == "cuda"
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)
        assert max(there.constraint_error(there.retr(x.cuda(), u.cuda()))) <= 2e-6  # the promise


def test_a_fixed_schedule_does_not_wait_for_the_device():
    _, _, x, u = setting(torch.float32)
    x, u = x.cuda(), u.cuda()
    expected = NewtonSchulz(1.0)(x, u)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns, once, that not every wait is found
            torch.cuda.set_sync_debug_mode("error")
        found = NewtonSchulz(1.0)(x, u)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


@metrics
def test_logarithm_and_distance_agree(metric):
    here, there, x, u = setting(torch.float64, metric=metric)
    y = here.expmap(x, u)
    torch.testing.assert_close(there.logmap(x.cuda(), y.cuda()).cpu(), u, rtol=0, atol=1e-11)  # of the iteration
    torch.testing.assert_close(there.dist(x.cuda(), y.cuda()).cpu(), here.dist(x, y), rtol=0, atol=1e-11)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_thousand_steps_stay_on_the_manifold_whatever_the_matmul_precision(tf32):
    _, there, x, _ = setting(torch.float32)
    point = torch.nn.Parameter(x.cuda())
    target = torch.randn(3, 64, 5, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    optimizer = RiemannianAdamW([{"params": [point], "manifolds": [there]}], lr=1e-2, weight_decay=0.0)
    with matmul_precision(tf32):
        for _ in range(1000):
            optimizer.zero_grad()
            (point - target).square().sum().backward()
            optimizer.step()
    assert max(there.constraint_error(point)) <= 2e-6  # the promise


def test_a_manifold_follows_its_module_and_keeps_its_precision():
    _, there, x, _ = setting(torch.float32)
    module = torch.nn.Module()
    module.space = there
    module.to(torch.bfloat16)
    assert there.complement.dtype == torch.float64
    assert there.complement.device.type == "cuda"
    module.cpu()
    assert there.complement.device.type == "cpu"
    assert there.proju(x, x).device.type == "cpu"


@pytest.mark.parametrize("form", ["directions", "moment"])
def test_an_empty_subspace_goes_to_its_directions_and_a_filled_one_stays(form):
    a = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def extended(space, part):
        if form == "directions":
            return space.extended(part)
        return space.extended_to_moment(part @ part.mT, energy=1.0)

    there = extended(ProtectedSubspace.empty(24, dtype=torch.float64), a[:, :3].cuda())
    assert there.basis.device.type == "cuda"
    both = extended(there, a[:, 3:])  # on the host
    assert (both.basis.device.type, both.k) == ("cuda", 5)
    torch.testing.assert_close(both.project_out(a.cuda()), torch.zeros_like(a).cuda(), rtol=0, atol=1e-12)
