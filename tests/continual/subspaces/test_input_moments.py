"""Second moments, exact and sketched, against dense ones."""

import pytest
import torch
from twice import M, N

from manifold_cl.continual.subspaces.directions import ImportanceMeasurement
from manifold_cl.continual.subspaces.gradient_sketches import Probes
from manifold_cl.continual.subspaces.input_moments import FewTokens, InputMoment, InputSketch
from manifold_cl.continual.subspaces.statistic import Tokens


def test_the_input_moment_is_the_dense_one_over_live_tokens(generator: torch.Generator) -> None:
    x, d = torch.randn(12, N, generator=generator), torch.randn(12, M, generator=generator)
    d[[2, 5, 11]] = 0.0  # padding: no gradient reaches it
    x[[2, 5, 11]] = 1e3
    live = torch.ones(12, dtype=torch.bool)
    live[[2, 5, 11]] = False
    plain, weighted = InputMoment(N), InputMoment(N, weighted=True)
    for part in (slice(0, 4), slice(4, 12)):
        plain.add(x[part], d[part])
        weighted.add(x[part], d[part])
    torch.testing.assert_close(plain.importance(), x[live].T @ x[live], rtol=1e-5, atol=1e-5)  # float32, other order
    scaled = x[live] * d[live].norm(dim=1, keepdim=True)
    torch.testing.assert_close(weighted.importance(), scaled.T @ scaled, rtol=1e-5, atol=1e-4)  # float32, other order


@pytest.mark.parametrize("weighted", [False, True])
def test_few_tokens_are_kept_and_many_have_the_bits_of_the_moment(weighted: bool, generator: torch.Generator) -> None:
    x, d = torch.randn(40, 32, generator=generator), torch.randn(40, M, generator=generator)
    d[::4] = 0.0
    few, moment = FewTokens(32, weighted=weighted), InputMoment(32, weighted=weighted)
    for part in (slice(0, 10), slice(10, 20)):
        few.add(x[part], d[part])
        moment.add(x[part], d[part])
    kept = few.importance()
    assert isinstance(kept, Tokens)
    assert kept.columns.shape == (32, 15)  # 20 less the fourth ones
    assert kept.total == pytest.approx(float(kept.columns.square().sum()), rel=1e-6)
    assert kept.captured == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(kept.columns @ kept.columns.T, moment.importance(), rtol=1e-5, atol=1e-4)
    for part in (slice(20, 24), slice(24, 40)):  # 18 tokens are more than half of 32 inputs
        few.add(x[part], d[part])
        moment.add(x[part], d[part])
    assert torch.equal(few.importance(), moment.importance())


def test_ranks_sum_the_moment_of_kept_tokens(generator: torch.Generator) -> None:
    x = torch.randn(5, 32, generator=generator)
    few, moment = FewTokens(32), InputMoment(32)
    few.add(x, torch.ones(5, M))
    moment.add(x, torch.ones(5, M))
    assert torch.equal(few.sums()[0], moment.sums()[0])
    assert torch.equal(few.importance(), moment.importance())


def test_kept_tokens_hold_all_energy_and_no_moment_is_allocated(generator: torch.Generator) -> None:
    """A threshold of 1 is reached: rounding of a float32 sum takes no second pass over the data."""
    measurement = ImportanceMeasurement("activation", energy=1.0, seed=0)
    for _ in range(20):
        few = FewTokens(1024)
        assert few.nbytes() == 0
        few.add(torch.randn(100, 1024, generator=generator), torch.ones(100, M))
        assert few.nbytes() == 4 * 100 * 1024
        assert few.importance().captured == 1.0
        assert measurement.result(few)[1]
    assert few.sums()[0].shape == (1024, 1024)
    assert few.nbytes() == InputMoment.bytes_for(1024)
    assert torch.equal(FewTokens(8).importance(), torch.zeros(8, 8))  # no tokens


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_moment_is_complete_and_symmetric_whenever_it_is_read(generator, n: int, weighted: bool) -> None:
    """The blocks that are computed have the bits of one product, and a later part changes all blocks again."""
    moment, expected = InputMoment(n, weighted=weighted), torch.zeros(n, n)
    for _ in range(3):
        x, d = torch.randn(50, n, generator=generator), torch.randn(50, M, generator=generator)
        moment.add(x, d)
        x = x * d.norm(dim=1, keepdim=True) if weighted else x
        expected.addmm_(x.mT, x)
        read = moment.importance()
        assert torch.equal(read, read.mT)
        torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-4)  # other libraries order sums differently


def decaying(generator: torch.Generator, tokens: int, n: int) -> torch.Tensor:
    """Inputs whose second moment has the eigenvalues 1/j²."""
    left, _ = torch.linalg.qr(torch.randn(tokens, n, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return (left / torch.arange(1, n + 1.0)) @ right.T


@pytest.mark.parametrize("weighted", [False, True])
def test_the_sketched_moment_nearly_is_the_exact_one_and_never_more(weighted: bool, generator: torch.Generator) -> None:
    x, d = decaying(generator, 90, 64), torch.randn(90, M, generator=generator)
    d[::5] = 0.0
    exact, sketch = InputMoment(64, weighted=weighted), InputSketch(64, size=24, probes=Probes(0), weighted=weighted)
    for part, back in zip(x.split(17), d.split(17), strict=True):
        exact.add(part, back)
        sketch.add(part, back)
    moment, held = exact.importance().double(), sketch.importance()
    total = float(moment.diagonal().sum())
    assert held.total == pytest.approx(total, rel=1e-5)  # the trace is summed exactly, in float32
    approximation = held.columns @ held.columns.T
    excess = torch.linalg.eigvalsh(approximation - moment)
    assert float(excess[-1]) < 1e-5 * total  # never more, up to float32 sums
    assert 1 - held.captured == pytest.approx(float((moment - approximation).diagonal().sum()) / total, abs=1e-5)
    best = float(torch.linalg.eigvalsh(moment)[-24:].sum()) / total
    assert best - 0.03 < held.captured <= best + 1e-5  # the tail beyond 24 of 1/j² is 2.6 % of it
    leading = torch.linalg.eigh(moment).eigenvectors[:, -3:]
    found, _ = torch.linalg.qr(held.columns[:, :6])
    assert float(torch.linalg.svdvals(found.T @ leading)[-1]) > 0.999  # squares of 1/25 against 1/9


def test_a_sketched_moment_of_few_tokens_is_exact(generator: torch.Generator) -> None:
    x = torch.randn(5, 64, generator=generator)
    sketch = InputSketch(64, size=16, probes=Probes(0))
    sketch.add(x, torch.ones(5, 2))
    held = sketch.importance()
    expected = (x.T @ x).double()
    assert (held.columns @ held.columns.T - expected).norm() < 1e-4 * expected.norm()  # the shift: 1e-7 · 64 · √16
    assert held.captured > 0.9999
    assert sketch.nbytes() == InputSketch.bytes_for(64, 16) == 4 * 64 * 16 + 8


def test_a_sketch_that_heard_nothing_but_silence_has_no_directions() -> None:
    sketch = InputSketch(N, size=4, probes=Probes(0))
    sketch.add(torch.ones(3, N), torch.zeros(3, M))
    held = sketch.importance()
    assert (held.total, float(held.columns.abs().max()), held.captured) == (0.0, 0.0, 1.0)
