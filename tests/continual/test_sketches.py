"""Streamed statistics against the dense matrices that they stand for."""

import pytest
import torch
from torch import Tensor, nn

from manifold_cl import LoRALinear, ProtectedSubspace, inject_adapters
from manifold_cl.continual.covariance import InputMoment
from manifold_cl.continual.observing import gather
from manifold_cl.continual.sketches import GradientSketch
from manifold_cl.continual.statistic import Statistic

M, N = 14, 20


class Shared(nn.Module):
    """A model that calls one linear layer twice in a forward pass."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = nn.Linear(N, M)
        self.back = nn.Linear(M, N)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.tanh(self.back(torch.tanh(self.layer(x)))))
        return out


@pytest.fixture
def model(generator: torch.Generator) -> Shared:
    return Shared(generator)


@pytest.fixture
def batches(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(5, 3, N, generator=generator) for _ in range(2)]


def loss_of(model: Shared, x: Tensor) -> Tensor:
    return model(x)[..., :2].square().sum()


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
    gather({"layer": model.layer}, [lambda x=x: loss_of(model, x) for x in batches], {"layer": sketch})
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
    torch.testing.assert_close(sketch.moment().float(), gradient.T @ gradient, rtol=0, atol=1e-4)  # 16 · float32


def test_the_energy_estimate_is_unbiased(generator: torch.Generator) -> None:
    x, d = torch.randn(9, N, generator=generator), torch.randn(9, M, generator=generator)
    expected = float((d.T @ x).square().sum())
    estimates = []
    for _ in range(200):
        sketch = GradientSketch(M, N, size=8, generator=generator)
        sketch.add(x, d)
        estimates.append(sketch.energy())
    # One estimate deviates by at most sqrt(2 / 8) = 50 %, the mean of 200 by 3.5 %: three of those.
    assert sum(estimates) / 200 == pytest.approx(expected, rel=0.105)


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
    torch.testing.assert_close(plain.moment(), x[live].T @ x[live], rtol=1e-5, atol=1e-5)  # float32, other order
    scaled = x[live] * d[live].norm(dim=1, keepdim=True)
    torch.testing.assert_close(weighted.moment(), scaled.T @ scaled, rtol=1e-5, atol=1e-4)  # float32, other order


def test_padding_in_a_real_batch_does_not_enter_the_moment(model: Shared, generator: torch.Generator) -> None:
    model.requires_grad_(False)
    x = torch.randn(6, 4, N, generator=generator)
    mask = torch.ones(6, 4)
    mask[:, 2:] = 0.0
    moment = InputMoment(N)
    gather(
        {"layer": model.layer},
        [lambda: (model.layer(x).square() * mask[..., None]).sum()],
        {"layer": moment},
    )
    live = x[:, :2].reshape(-1, N)
    torch.testing.assert_close(moment.moment(), live.T @ live, rtol=1e-5, atol=1e-5)  # float32, other order


def test_gathering_needs_no_gradient_of_any_weight_and_leaves_nothing_behind(
    model: Shared, batches: list[Tensor]
) -> None:
    model.requires_grad_(False)
    statistics: dict[str, Statistic] = {"layer": InputMoment(N), "back": InputMoment(M)}
    layers = {"layer": model.layer, "back": model.back}
    with torch.no_grad():  # even where the caller has switched gradients off
        gather(layers, [lambda x=x: loss_of(model, x) for x in batches], statistics)
    first = torch.cat([x.reshape(-1, N) for x in batches])
    second = torch.tanh(model.back(torch.tanh(model.layer(first))))
    expected = first.T @ first + second.T @ second  # both calls of the layer
    torch.testing.assert_close(statistics["layer"].moment(), expected, rtol=1e-5, atol=1e-4)  # float32, other order
    inner = torch.tanh(model.layer(first))
    torch.testing.assert_close(statistics["back"].moment(), inner.T @ inner, rtol=1e-5, atol=1e-4)  # the same
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not model(batches[0]).requires_grad


def test_hooks_are_removed_when_a_loss_fails(model: Shared) -> None:
    def broken() -> Tensor:
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match="no such batch"):
        gather({"layer": model.layer}, [broken], {"layer": InputMoment(N)})
    assert not model.layer._forward_hooks


def test_a_loss_that_is_not_a_number_stops_the_gathering(model: Shared) -> None:
    model.requires_grad_(False)
    x = torch.full((2, N), float("nan"))
    with pytest.raises(FloatingPointError, match="a loss became nan while statistics were gathered: lower the learn"):
        gather({"layer": model.layer}, [lambda: loss_of(model, x)], {"layer": InputMoment(N)})


def test_layers_in_front_of_an_operation_in_place_are_observed_too(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(N, M), nn.ReLU(inplace=True), nn.Linear(M, 3)).requires_grad_(False)
    x = torch.randn(7, N, generator=generator)
    moments: dict[str, Statistic] = {"0": InputMoment(N), "2": InputMoment(M)}
    gather({"0": model[0], "2": model[2]}, [lambda: model(x).square().sum()], moments)
    inner = model[0](x).relu()
    torch.testing.assert_close(moments["0"].moment(), x.T @ x, rtol=1e-5, atol=1e-5)  # float32, other order
    torch.testing.assert_close(moments["2"].moment(), inner.T @ inner, rtol=1e-5, atol=1e-5)  # the same


def test_layers_in_half_precision_are_summed_in_float32(generator: torch.Generator) -> None:
    layer = nn.Linear(N, M).to(torch.bfloat16).requires_grad_(False)
    moment = InputMoment(N)
    x = torch.randn(300, N, generator=generator).to(torch.bfloat16)
    gather({"layer": layer}, [lambda: layer(x).float().square().sum()], {"layer": moment})
    expected = x.float().T @ x.float()
    assert moment.moment().dtype == torch.float32
    assert (moment.moment() - expected).norm() < 1e-6 * expected.norm()  # bfloat16 sums would be off by 4e-3


def test_adapters_inside_the_layer_do_not_disturb_what_is_observed(
    model: Shared, batches: list[Tensor], generator: torch.Generator
) -> None:
    inject_adapters(model, ["layer"], lambda _, linear: LoRALinear(linear, 2, generator=generator))
    moment = InputMoment(N)
    gather({"layer": model.layer}, [lambda: model.layer(batches[0]).square().sum()], {"layer": moment})
    x = batches[0].reshape(-1, N)
    torch.testing.assert_close(moment.moment(), x.T @ x, rtol=1e-5, atol=1e-5)  # float32, other order


def test_an_input_that_is_changed_in_place_is_noticed():
    layer = nn.Linear(4, 3).requires_grad_(False)
    statistics = {"layer": InputMoment(4)}

    def loss():
        x = torch.ones(2, 4)
        y = layer(x)
        x.add_(1)
        return y.sum()

    with pytest.raises(RuntimeError, match="the input of layer was changed in place"):
        gather({"layer": layer}, [loss], statistics)


def test_equal_sketches_give_equal_triplets_whatever_lies_in_free_memory(generator: torch.Generator) -> None:
    # As torch.linalg.lstsq does not by default: its pivoted driver reads pivots that nobody set.
    sketch = GradientSketch(96, 80, size=24, generator=generator)
    sketch.add(torch.randn(200, 80, generator=generator), torch.randn(200, 96, generator=generator))
    first = sketch.triplets()
    for fill in range(20):
        for size in range(20, 50):
            torch.full((size,), fill, dtype=torch.int32)
        assert all(map(torch.equal, sketch.triplets(), first))
