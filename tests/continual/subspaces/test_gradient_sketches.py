"""Sketches of a gradient against the dense matrix."""

import pytest
import torch
from torch import Tensor
from twice import M, N, Shared, batches_of, loss_of

from manifold_cl import ProtectedSubspace
from manifold_cl.continual.subspaces.gradient_sketches import GradientSketch, Probes, RangeSketch
from manifold_cl.continual.subspaces.hooks import collect_statistics


@pytest.fixture
def model(generator: torch.Generator) -> Shared:
    return Shared(generator)


@pytest.fixture
def batches(generator: torch.Generator) -> list[Tensor]:
    return batches_of(generator)


def dense_gradients(model: Shared, batches: list[Tensor]) -> dict[str, Tensor]:
    """By autograd, with weights that require gradients."""
    model.requires_grad_(True)
    weights = {"layer": model.layer.weight, "back": model.back.weight}
    total = torch.stack([loss_of(model, x) for x in batches]).sum()
    found = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    model.requires_grad_(False)
    return found


def sketched(model: Shared, batches: list[Tensor], generator: torch.Generator, **options: Tensor) -> GradientSketch:
    sketch = GradientSketch(M, N, size=M, generator=generator, **options)
    collect_statistics({"layer": model.layer}, [lambda x=x: loss_of(model, x) for x in batches], {"layer": sketch})
    return sketch


def test_a_full_size_sketch_is_the_gradient_of_a_layer_that_is_called_twice(
    model: Shared, batches: list[Tensor], generator: torch.Generator
) -> None:
    expected = dense_gradients(model, batches)["layer"].double()
    left, sigma, right = sketched(model, batches, generator).triplets()
    found = left @ torch.diag(sigma) @ right.T
    # Float32 sums, amplified by the condition of the small Gaussian systems (about 100).
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(sigma, torch.linalg.svdvals(expected), rtol=1e-4, atol=1e-4 * float(sigma[0]))  # same


def test_a_small_sketch_recovers_a_gradient_of_low_rank_with_its_triplets(generator: torch.Generator) -> None:
    wanted_left, _ = torch.linalg.qr(torch.randn(M, 3, generator=generator))
    wanted_right, _ = torch.linalg.qr(torch.randn(N, 3, generator=generator))
    wanted_sigma = torch.tensor([4.0, 2.0, 1.0])
    sketch = GradientSketch(M, N, size=6, generator=generator)
    for k in range(3):  # three additions of one token, whose sum is the gradient
        sketch.add(wanted_right[:, k : k + 1].T, wanted_sigma[k] * wanted_left[:, k : k + 1].T)
    left, sigma, right = sketch.triplets()
    assert left.shape == (M, 6)
    assert right.shape == (N, 6)
    torch.testing.assert_close(sigma[:3], wanted_sigma.double(), rtol=1e-5, atol=0)  # float32 sums
    assert float(sigma[3:].max()) < 1e-5  # nothing else is there
    for found, wanted in ((left, wanted_left), (right, wanted_right)):
        cosines = (found[:, :3] * wanted).sum(0).abs()
        torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)  # float32 sums
    signs = (left[:, :3] * wanted_left).sum(0) * (right[:, :3] * wanted_right).sum(0)
    assert bool((signs > 0).all())  # left and right belong together
    gradient = wanted_left @ torch.diag(wanted_sigma) @ wanted_right.T
    held = sketch.importance()
    moment = (held.columns @ held.columns.T).float()
    torch.testing.assert_close(moment, gradient.T @ gradient, rtol=0, atol=1e-4)  # 16 · float32
    assert held.captured == pytest.approx(1.0, abs=1e-9)  # nothing is missed: float32, squared


def test_a_sketch_with_a_complement_is_that_of_the_projected_gradient(
    model: Shared, batches: list[Tensor], generator: torch.Generator
) -> None:
    protected = ProtectedSubspace.from_directions(torch.randn(N, 7, generator=generator))
    expected = dense_gradients(model, batches)["layer"]
    expected = protected.project_out(expected.T).T.double()
    left, sigma, right = sketched(model, batches, generator, complement=protected.basis).triplets()
    assert (left @ torch.diag(sigma) @ right.T - expected).norm() <= 1e-4 * expected.norm()  # as above
    leading = right[:, sigma > 1e-3 * sigma[0]]
    assert leading.shape[1] >= 2
    assert float((protected.basis.double().T @ leading).abs().max()) < 1e-4  # float32 over a share of 1e-3


def test_a_sketch_of_size_larger_than_the_layer_is_cut(generator: torch.Generator) -> None:
    sketch = GradientSketch(3, 5, size=64, generator=generator)
    sketch.add(torch.eye(5)[:1], torch.eye(3)[:1])
    assert sketch.triplets().sigma.shape == (3,)
    assert float(sketch.triplets().sigma[0]) == pytest.approx(1.0, rel=1e-5)  # float32


def test_equal_sketches_give_equal_triplets_whatever_lies_in_free_memory(generator: torch.Generator) -> None:
    # As torch.linalg.lstsq does not by default: its pivoted driver reads pivots that nobody set.
    sketch = GradientSketch(96, 80, size=24, generator=generator)
    sketch.add(torch.randn(200, 80, generator=generator), torch.randn(200, 96, generator=generator))
    first = sketch.triplets()
    for fill in range(20):
        for size in range(20, 50):
            torch.full((size,), fill, dtype=torch.int32)
        assert all(map(torch.equal, sketch.triplets(), first))


def decaying(generator: torch.Generator, m: int, n: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens whose gradient has the singular values 1/j, j up to ``rank``, and that gradient."""
    left, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator))
    mix, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))  # tokens, each a mixture
    sigma = 1 / torch.arange(1, rank + 1.0)
    x, d = mix @ right.T, (mix * sigma) @ left.T
    return x, d, d.T @ x


def test_what_a_sketch_missed_is_estimated_without_bias(generator: torch.Generator) -> None:
    x, d, gradient = decaying(generator, 40, 30, 30)
    ratios = []
    for _ in range(100):
        sketch = GradientSketch(40, 30, size=8, generator=generator)
        sketch.add(x, d)
        found = sketch.triplets()
        error = gradient.double() - found.left @ torch.diag(found.sigma) @ found.right.T
        ratios.append(sketch.missed(found) / float(error.square().sum()))
    # One estimate deviates by at most sqrt(2 / 10) = 45 %, the mean of 100 by 4.5 %: three of those.
    assert sum(ratios) / 100 == pytest.approx(1.0, rel=0.135)


@pytest.mark.parametrize("size", [8, 16, 29])
def test_what_a_sketch_holds_and_misses_is_within_its_bound(size: int, generator: torch.Generator) -> None:
    x, d, _ = decaying(generator, 80, 60, 60)
    sketch = GradientSketch(80, 60, size=size, generator=generator)
    sketch.add(x, d)
    held = sketch.importance()
    energies = (1 / torch.arange(1, 61.0)).double().square()
    assert held.captured < float(energies[:size].sum() / energies.sum()) + 0.01  # no sketch holds more than the best
    # tropp2019streaming, theorem 5.1: the expected squared error, for any rank below the size.
    expected = 2 * min(
        (size + rank - 1) / (size - rank - 1) * float(energies[rank:].sum()) for rank in range(1, size - 1)
    )
    assert held.total - float(held.columns.square().sum()) < 2 * expected  # twice the expectation, one draw


def test_a_second_pass_squares_the_error_of_the_directions(generator: torch.Generator) -> None:
    x, d, gradient = decaying(generator, 80, 60, 60)
    sketch = GradientSketch(80, 60, size=20, generator=generator)
    sketch.add(x, d)
    first = RangeSketch(80, 60, size=20, probes=Probes(0))
    first.add(x, d)
    again = first.refined()
    for part, back in zip(x.split(7), d.split(7), strict=True):
        again.add(part, back)
    _, sigma, vt = torch.linalg.svd(gradient.double())

    def angle(right: Tensor) -> float:
        return float(torch.linalg.matrix_norm(vt[:3].T - right @ (right.T @ vt[:3].T), 2))

    once, twice = sketch.triplets(), again.triplets()
    assert angle(twice.right) < angle(once.right) / 3
    u = torch.linalg.svd(gradient.double()).U[:, :3]
    missed = torch.linalg.matrix_norm(u - twice.left @ (twice.left.T @ u), 2)
    assert bool((twice.sigma[:3] <= sigma[:3] + 1e-6).all())  # a projection, up to float32 sums
    assert bool((twice.sigma[:3] >= sigma[:3] * (1 - missed**2)).all())  # second order in the angle of the range
    held = again.importance()
    total = float(gradient.double().square().sum())
    true_share = float((again.triplets().left.T @ gradient.double()).square().sum()) / total
    assert held.captured == pytest.approx(true_share, abs=2 * (1 - true_share))  # only the missed part is estimated
    assert held.total == pytest.approx(total, rel=2 * (1 - true_share))  # the same
    torch.testing.assert_close(twice.left.T @ twice.left, torch.eye(20).double(), rtol=0, atol=1e-5)  # float32 P
    back = gradient.double().T @ twice.left
    torch.testing.assert_close(back, twice.right * twice.sigma, rtol=0, atol=1e-5)  # float32 sums


def test_a_second_pass_avoids_the_complement_too(generator: torch.Generator) -> None:
    protected = ProtectedSubspace.from_directions(torch.randn(30, 5, generator=generator))
    x, d, gradient = decaying(generator, 40, 30, 30)
    first = RangeSketch(40, 30, size=30, probes=Probes(0), complement=protected.basis)
    first.add(x, d)
    with pytest.raises(TypeError, match="refined"):
        first.importance()
    again = first.refined()
    again.add(x, d)
    held = again.importance()
    expected = protected.project_out(gradient.T).double()
    assert float((protected.basis.double().T @ held.columns).abs().max()) < 1e-6  # float32
    assert held.total == pytest.approx(float(expected.square().sum()), rel=1e-5)  # a full sketch misses nothing


def test_shared_test_matrices_depend_on_seed_purpose_and_shape_alone() -> None:
    one, other = Probes(3), Probes(3)
    first = one.gaussian("range", 6, 4, "cpu")
    other.gaussian("co-range", 6, 4, "cpu")  # what was drawn before does not matter
    assert torch.equal(first, other.gaussian("range", 6, 4, "cpu"))
    assert one.gaussian("range", 6, 4, "cpu") is first
    assert not torch.equal(first, one.gaussian("co-range", 6, 4, "cpu"))
    assert not torch.equal(first, Probes(4).gaussian("range", 6, 4, "cpu"))
    one.forget()
    again = one.gaussian("range", 6, 4, "cpu")
    assert again is not first
    assert torch.equal(first, again)


def test_sketches_of_equal_layers_share_their_test_matrices_and_not_their_sums(generator: torch.Generator) -> None:
    probes = Probes(0)
    a, b = (GradientSketch(40, 30, size=6, generator=probes) for _ in range(2))
    assert a.draws() == b.draws() != GradientSketch(40, 30, size=6, generator=Probes(1)).draws()
    x, d, _ = decaying(generator, 40, 30, 30)
    a.add(x, d)
    assert all(float(total.abs().max()) == 0 for total in b.sums())
    a.add(x, -d)  # linear: the opposite undoes
    assert all(float(total.abs().max()) < 1e-5 for total in a.sums())  # float32, sums of 30 numbers of size 1


def test_the_memory_of_a_sketch_is_what_it_says(generator: torch.Generator) -> None:
    sketch = GradientSketch(40, 30, size=6, generator=generator)
    assert sketch.size == 6
    assert sketch.nbytes() == GradientSketch.bytes_for(40, 30, 6) == 4 * (70 * 6 + 13 * 13 + 30 * 10)
    own = GradientSketch.bytes_for(40, 30, 6, own_probes=True)
    assert own == sketch.nbytes() + 4 * (70 * (6 + 13) + 40 * 10)
    wide = GradientSketch(40, 30, size=6, generator=generator, dtype=torch.float64)
    assert all(total.dtype == torch.float64 for total in wide.sums())


def test_checks_do_not_disturb_the_draws_of_later_sketches() -> None:
    """Runs that were made before sketches checked themselves keep their numbers."""
    draw, plain = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    GradientSketch(40, 30, size=6, generator=draw)
    for shape in ((30, 6), (40, 6), (30, 13), (40, 13)):
        torch.randn(shape, generator=plain)
    assert torch.equal(torch.randn(3, generator=draw), torch.randn(3, generator=plain))
