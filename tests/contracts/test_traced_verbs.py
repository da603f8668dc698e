"""Verbs under torch.func and torch.compile: no value is read on the way, and the numbers are those of a loop."""

import subprocess
import sys

import pytest
import torch

from manifold_cl import RETRACTIONS, RestrictedStiefel

VERBS = {
    "retr": lambda m, x, u, v: m.retr(x, u),
    "expmap": lambda m, x, u, v: m.expmap(x, u),
    "retr_transp": lambda m, x, u, v: m.retr_transp(x, u, v)[1],
    "expmap_transp": lambda m, x, u, v: m.expmap_transp(x, u, v)[1],
    "projx far": lambda m, x, u, v: m.projx(v + 0 * x),
    "projx near": lambda m, x, u, v: m.projx(x + 1e-3 * v),
    "proju": lambda m, x, u, v: m.proju(x, v),
    "egrad2rgrad": lambda m, x, u, v: m.egrad2rgrad(x, v),
}


def problem(name="polar", **options):
    draw = torch.Generator().manual_seed(0)
    manifold = RestrictedStiefel(torch.randn(12, 3, dtype=torch.float64, generator=draw), retraction=name, **options)
    x = manifold.random(3, 12, 4, generator=draw).as_subclass(torch.Tensor)
    u, v = (torch.randn(3, 12, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    return manifold, x, 0.3 * u, v


CASES = [("polar", verb) for verb in VERBS] + [(name, verb) for name in RETRACTIONS for verb in ("retr", "retr_transp")]


@pytest.mark.parametrize(("name", "verb"), sorted(set(CASES)))
def test_vmap_gives_the_numbers_and_derivatives_of_a_loop(name, verb):
    manifold, *args = problem(name)

    def call(*args):
        return VERBS[verb](manifold, *args)

    looped = torch.stack([call(*each) for each in zip(*args, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(*args), looped, rtol=0, atol=1e-13)  # two forms of one map

    def weighed(*args):
        return (call(*args) * args[2]).sum()

    one = [torch.func.grad(weighed, argnums=(0, 1, 2))(*each) for each in zip(*args, strict=True)]
    all_at_once = torch.func.vmap(torch.func.grad(weighed, argnums=(0, 1, 2)))(*args)
    for batched, single in zip(all_at_once, zip(*one, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(single), rtol=0, atol=1e-11)  # condition of the steps, 1e2


@pytest.mark.parametrize("verb", ["projx far", "projx near", "retr"])
def test_forward_and_backward_derivatives_agree_with_differences(verb):
    manifold, *args = problem()
    x, u, v = (each[0] for each in args)
    along = args[2][1]

    def path(t):
        return VERBS[verb](manifold, x + t * along, u, v + t * along)

    _, forward = torch.func.jvp(path, (torch.zeros((), dtype=x.dtype),), (torch.ones((), dtype=x.dtype),))
    h = 1e-4
    difference = (8 * (path(h) - path(-h)) - (path(2 * h) - path(-2 * h))) / (12 * h)
    torch.testing.assert_close(forward, difference, rtol=0, atol=1e-8)  # differences of fourth order
    backward = torch.func.grad(lambda t: (path(t) * v).sum())(torch.zeros((), dtype=x.dtype))
    assert float(backward) == pytest.approx(float((forward * v).sum()), abs=1e-10)


def test_float32_verbs_are_on_the_manifold_under_vmap_at_any_length():
    manifold, x, u, _ = problem()
    manifold, x, u = RestrictedStiefel(manifold.complement.float()), x.float(), u.float()
    for length in (1e-3, 1.0, 1e5, 1e30):
        y = torch.func.vmap(manifold.retr)(x, length * u)
        assert y.dtype == torch.float32
        assert max(manifold.constraint_error(y)) <= 2e-6  # the documented bound


@pytest.mark.parametrize("transport", ["differentiated", "isometric"])
def test_transports_of_cayley_work_under_vmap(transport):
    manifold, x, u, v = problem("cayley", transport=transport)
    looped = torch.stack([manifold.retr_transp(*each)[1] for each in zip(x, u, v, strict=True)])
    torch.testing.assert_close(torch.func.vmap(manifold.retr_transp)(x, u, v)[1], looped, rtol=0, atol=1e-13)


def test_parallel_transport_refuses_what_it_cannot_do():
    manifold, x, u, v = problem("exponential_canonical", metric="canonical", transport="parallel")
    with pytest.raises(ValueError, match="vmap"):
        torch.func.vmap(manifold.retr_transp)(x, u, v)
    with pytest.raises(ValueError, match=r"length .*e\+06 .* the longest is 1e\+04"):
        manifold.retr_transp(x, 1e20 * u, v)


COMPILING = """
import torch
from manifold_cl import RestrictedStiefel
draw = torch.Generator().manual_seed(0)
for dtype, near in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
    manifold = RestrictedStiefel(torch.randn(12, 3, dtype=dtype, generator=draw))
    x = manifold.random(2, 12, 4, generator=draw).as_subclass(torch.Tensor)
    z = torch.randn(2, 12, 4, dtype=dtype, generator=draw)
    for point in (z, x + 1e-3 * z, 1e20 * z):
        torch._dynamo.reset()
        compiled = torch.compile(manifold.projx, backend="eager", fullgraph=True)(point)
        torch.testing.assert_close(compiled, manifold.projx(point), rtol=0, atol=near)
    torch._dynamo.reset()
    y = torch.compile(manifold.retr, backend="eager", fullgraph=True)(x, 1e20 * z)
    torch.testing.assert_close(y, manifold.retr(x, 1e20 * z), rtol=0, atol=near)
"""


@pytest.mark.slow  # the fast suite compiles in test_checks.py
def test_the_nearest_point_and_long_steps_compile_without_a_graph_break():
    # In a process of its own: the tests' shape checker wraps functions in a way that dynamo cannot trace.
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILING], check=True)
