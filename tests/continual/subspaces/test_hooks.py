"""Statistics from hooks against dense products, and hooks that leave no trace."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twice import M, N, Shared, batches_of, loss_of

from manifold_cl import inject_adapters
from manifold_cl.adapters import LoRALinear
from manifold_cl.continual.subspaces import hooks
from manifold_cl.continual.subspaces.gradient_sketches import GradientSketch
from manifold_cl.continual.subspaces.hooks import collect_statistics
from manifold_cl.continual.subspaces.input_moments import InputMoment
from manifold_cl.continual.subspaces.statistic import Statistic


@pytest.fixture
def model(generator: torch.Generator) -> Shared:
    return Shared(generator)


@pytest.fixture
def batches(generator: torch.Generator) -> list[Tensor]:
    return batches_of(generator)


def test_padding_in_a_real_batch_does_not_enter_the_moment(model: Shared, generator: torch.Generator) -> None:
    model.requires_grad_(False)
    x = torch.randn(6, 4, N, generator=generator)
    mask = torch.ones(6, 4)
    mask[:, 2:] = 0.0
    moment = InputMoment(N)
    collect_statistics(
        {"layer": model.layer},
        [lambda: (model.layer(x).square() * mask[..., None]).sum()],
        {"layer": moment},
    )
    live = x[:, :2].reshape(-1, N)
    torch.testing.assert_close(moment.importance(), live.T @ live, rtol=1e-5, atol=1e-5)  # float32, other order


def test_no_weight_needs_a_gradient_and_no_hook_stays(model: Shared, batches: list[Tensor]) -> None:
    model.requires_grad_(False)
    statistics: dict[str, Statistic] = {"layer": InputMoment(N), "back": InputMoment(M)}
    layers = {"layer": model.layer, "back": model.back}
    with torch.no_grad():  # even where the caller has switched gradients off
        collect_statistics(layers, [lambda x=x: loss_of(model, x) for x in batches], statistics)
    first = torch.cat([x.reshape(-1, N) for x in batches])
    second = torch.tanh(model.back(torch.tanh(model.layer(first))))
    expected = first.T @ first + second.T @ second  # both calls of the layer
    torch.testing.assert_close(statistics["layer"].importance(), expected, rtol=1e-5, atol=1e-4)  # float32, other order
    inner = torch.tanh(model.layer(first))
    torch.testing.assert_close(statistics["back"].importance(), inner.T @ inner, rtol=1e-5, atol=1e-4)  # the same
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not model(batches[0]).requires_grad


def test_hooks_are_removed_when_a_loss_fails(model: Shared) -> None:
    def broken() -> Tensor:
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match="no such batch"):
        collect_statistics({"layer": model.layer}, [broken], {"layer": InputMoment(N)})
    assert not model.layer._forward_hooks


def test_a_loss_that_is_nan_stops_the_pass(model: Shared) -> None:
    model.requires_grad_(False)
    x = torch.full((2, N), float("nan"))
    with pytest.raises(FloatingPointError, match="the loss of batch 0 became nan"):
        collect_statistics({"layer": model.layer}, [lambda: loss_of(model, x)], {"layer": InputMoment(N)})


def test_layers_in_front_of_an_operation_in_place_are_observed_too(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(N, M), nn.ReLU(inplace=True), nn.Linear(M, 3)).requires_grad_(False)
    x = torch.randn(7, N, generator=generator)
    moments: dict[str, Statistic] = {"0": InputMoment(N), "2": InputMoment(M)}
    collect_statistics({"0": model[0], "2": model[2]}, [lambda: model(x).square().sum()], moments)
    inner = model[0](x).relu()
    torch.testing.assert_close(moments["0"].importance(), x.T @ x, rtol=1e-5, atol=1e-5)  # float32, other order
    torch.testing.assert_close(moments["2"].importance(), inner.T @ inner, rtol=1e-5, atol=1e-5)  # the same


def test_layers_in_half_precision_are_summed_in_float32(generator: torch.Generator) -> None:
    layer = nn.Linear(N, M).to(torch.bfloat16).requires_grad_(False)
    moment = InputMoment(N)
    x = torch.randn(300, N, generator=generator).to(torch.bfloat16)
    collect_statistics({"layer": layer}, [lambda: layer(x).float().square().sum()], {"layer": moment})
    expected = x.float().T @ x.float()
    assert moment.importance().dtype == torch.float32
    assert (moment.importance() - expected).norm() < 1e-6 * expected.norm()  # bfloat16 sums would be off by 4e-3


def test_adapters_inside_the_layer_do_not_disturb_what_is_observed(
    model: Shared, batches: list[Tensor], generator: torch.Generator
) -> None:
    inject_adapters(model, ["layer"], lambda _, linear: LoRALinear(linear, 2, generator=generator))
    moment = InputMoment(N)
    collect_statistics({"layer": model.layer}, [lambda: model.layer(batches[0]).square().sum()], {"layer": moment})
    x = batches[0].reshape(-1, N)
    torch.testing.assert_close(moment.importance(), x.T @ x, rtol=1e-5, atol=1e-5)  # float32, other order


def test_an_input_that_is_changed_in_place_is_noticed():
    layer = nn.Linear(4, 3).requires_grad_(False)
    statistics = {"layer": InputMoment(4)}

    def loss():
        x = torch.ones(2, 4)
        y = layer(x)
        x.add_(1)
        return y.sum()

    with pytest.raises(RuntimeError, match="the input of layer was changed in place"):
        collect_statistics({"layer": layer}, [loss], statistics)


class Deep(nn.Module):
    """Three residual blocks, checkpointed or not."""

    def __init__(self, generator: torch.Generator, reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(N, N)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(N, M), nn.GELU(), nn.Linear(M, N)) for _ in range(3))
        self.reentrant = reentrant
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def gathered(reentrant: bool | None) -> dict[str, Tensor]:
    model = Deep(torch.Generator().manual_seed(1), reentrant)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    moments: dict[str, Statistic] = {
        name: InputMoment(layer.in_features, weighted=True) for name, layer in layers.items()
    }
    x = torch.randn(6, N, generator=torch.Generator().manual_seed(2))
    collect_statistics(layers, [lambda: model(x).square().sum()], moments)
    return {name: moment.importance() for name, moment in moments.items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain, checked = gathered(None), gathered(reentrant)
    assert len(plain) == 7
    for name, moment in plain.items():
        torch.testing.assert_close(checked[name], moment, rtol=1e-6, atol=1e-6)  # the same float32 operations


def test_checkpointing_without_reentry_keeps_no_inputs(generator: torch.Generator) -> None:
    """The inputs of layers inside a checkpoint die with the forward pass: the hooks hold no reference to them."""
    inner: list[weakref.ref[Tensor]] = []

    class Remembering(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.relu()
            inner.append(weakref.ref(y))
            return y

    block = nn.Sequential(nn.Linear(N, M), Remembering(), nn.Linear(M, N)).requires_grad_(False)
    moments: dict[str, Statistic] = {"2": InputMoment(M)}
    x = torch.randn(4, N, generator=generator, requires_grad=True)
    alive: list[bool] = []

    def loss() -> Tensor:
        y = checkpoint(block, x, use_reentrant=False)
        alive.append(inner[0]() is not None)
        return y.square().sum()

    collect_statistics({"2": block[2]}, [loss], moments)
    assert alive == [False]
    hidden = block[0](x).relu().detach()
    torch.testing.assert_close(moments["2"].importance(), hidden.T @ hidden, rtol=1e-6, atol=1e-6)  # float32


def test_reentrant_checkpointing_of_a_model_without_gradients_says_what_is_missing(generator: torch.Generator) -> None:
    block = nn.Sequential(nn.Linear(N, M)).requires_grad_(False)
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(ValueError, match=r"depends on none of the layers.*enable_input_require_grads"),
    ):
        collect_statistics(
            {"0": block[0]},
            [lambda: checkpoint(block, torch.ones(1, N), use_reentrant=True).sum()],
            {"0": InputMoment(N)},
        )


@pytest.mark.parametrize("kind", ["autocast", "model"])
def test_statistics_of_bfloat16_passes_are_float32_sums_of_what_passed(kind: str, generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(N, M), nn.GELU(), nn.Linear(M, N)).requires_grad_(False)
    x = torch.randn(50, N, generator=generator)
    if kind == "model":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    sketch = GradientSketch(N, M, size=M, generator=generator)
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        collect_statistics({"2": model[2]}, [lambda: model(x).float().square().sum()], {"2": sketch})
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert all(total.dtype == torch.float32 for total in sketch.sums())
    gradient = (2 * y.float()).to(torch.bfloat16).float().T @ seen[0].float()
    found = sketch.triplets()
    approximation = (found.left * found.sigma) @ found.right.T
    assert (approximation - gradient).norm() < 1e-3 * gradient.norm()  # float32 sums; products in bfloat16: 4e-3


def test_a_layer_may_be_called_by_keyword(generator: torch.Generator) -> None:
    layer = nn.Linear(N, M).requires_grad_(False)
    moment = InputMoment(N)
    x = torch.randn(3, N, generator=generator)
    collect_statistics({"layer": layer}, [lambda: layer(input=x).sum()], {"layer": moment})
    torch.testing.assert_close(moment.importance(), x.T @ x, rtol=1e-5, atol=1e-5)  # float32, other order


def test_long_batches_are_taken_in_pieces(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    class Counting(InputMoment):
        def add(self, x: Tensor, d: Tensor) -> None:
            rows.append(len(x))
            super().add(x, d)

    monkeypatch.setattr(hooks, "PIECE", 4 * (N + M))
    layer, moment = nn.Linear(N, M).requires_grad_(False), Counting(N)
    x = torch.randn(10, N, generator=generator)
    collect_statistics({"layer": layer}, [lambda: layer(x).sum()], {"layer": moment})
    assert rows == [4, 4, 2]
    torch.testing.assert_close(moment.importance(), x.T @ x, rtol=1e-5, atol=1e-5)  # float32, other order


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch to collect statistics from: give at least one example"):
        collect_statistics({"layer": nn.Linear(N, M)}, [], {"layer": InputMoment(N)})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: None, "batch 1 has no loss: a tensor with one number is needed, got NoneType"),
        (lambda: torch.ones(3), r"batch 1 has no loss: a tensor with one number is needed, got shape \(3,\)"),
        (lambda: torch.ones(()), "the loss of batch 1 depends on none of the layers: they were not called"),
    ],
)
def test_a_batch_without_a_loss_is_named(loss: Callable[[], Any], message: str) -> None:
    layer = nn.Linear(N, M).requires_grad_(False)
    good = lambda: layer(torch.ones(1, N)).sum()  # noqa: E731 - a loss among others
    with pytest.raises(ValueError, match=message):
        collect_statistics({"layer": layer}, [good, loss], {"layer": InputMoment(N)})


def test_layers_that_no_gradient_reached_are_named(model: Shared, batches: list[Tensor]) -> None:
    model.requires_grad_(False)
    layers = {"layer": model.layer, "spare": nn.Linear(N, M), "back": model.back}
    moments: dict[str, Statistic] = {"layer": InputMoment(N), "spare": InputMoment(N), "back": InputMoment(M)}
    with pytest.raises(ValueError, match=r"no gradient reached 1 of 3 layers \(spare\): the loss does not depend on"):
        collect_statistics(layers, [lambda: loss_of(model, batches[0])], moments)
    with pytest.raises(ValueError, match=r"no gradient reached 2 of 3 layers \(spare, back\)"):
        collect_statistics(layers, [lambda: model.layer(model.back(torch.ones(1, M)).detach()).sum()], moments)


def test_batches_that_are_not_finite_are_named_or_left_out(model: Shared, batches: list[Tensor]) -> None:
    model.requires_grad_(False)
    layers = {"layer": model.layer}
    bad = torch.full_like(batches[0], float("inf"))
    losses = [lambda x=x: loss_of(model, x) for x in (batches[0], bad, batches[1])]
    with pytest.raises(FloatingPointError, match="the loss of batch 1 became nan"):
        collect_statistics(layers, losses, {"layer": InputMoment(N)})
    with_bad, without = InputMoment(N), InputMoment(N)
    counts: list[int] = []
    reading = collect_statistics(layers, losses, {"layer": with_bad}, on_nonfinite="skip", on_batch=counts.append)
    assert (reading.batches, reading.skipped, dict(reading.excluded), counts) == (3, (1,), {}, [1, 2, 3])
    collect_statistics(layers, losses[::2], {"layer": without})
    assert torch.equal(with_bad.importance(), without.importance())
    with pytest.raises(FloatingPointError, match="no batch of 1 has a finite loss: nothing was collected"):
        collect_statistics(layers, losses[1:2], {"layer": InputMoment(N)}, on_nonfinite="skip")
    with pytest.raises(ValueError, match="on_nonfinite is raise or skip, got 'ignore'"):
        collect_statistics(layers, losses, {"layer": InputMoment(N)}, on_nonfinite="ignore")  # type: ignore[arg-type]


def test_a_gradient_that_turns_nan_on_the_way_is_named_by_batch_and_layer(generator: torch.Generator) -> None:
    first, second = nn.Linear(N, M).requires_grad_(False), nn.Linear(M, 1).requires_grad_(False)

    def loss() -> Tensor:
        hidden = first(torch.zeros(1, N)) * 0  # sqrt(0) has no derivative, and its value is fine
        return second(hidden.square().sqrt()).sum()

    layers = {"first": first, "second": second}
    with pytest.raises(FloatingPointError, match="batch 0: inputs or gradients at first are NaN or infinite"):
        collect_statistics(layers, [loss], {"first": InputMoment(N), "second": InputMoment(M)})
    moments: dict[str, Statistic] = {"first": InputMoment(N), "second": InputMoment(M)}
    reading = collect_statistics(layers, [loss], moments, on_nonfinite="skip")
    assert (reading.skipped, dict(reading.excluded)) == ((), {0: ("first",)})
    assert all(bool(total.isfinite().all()) for moment in moments.values() for total in moment.sums())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_statistics_stay_on_the_layers_device(generator: torch.Generator) -> None:
    layer = nn.Linear(N, M, device="cuda").requires_grad_(False)
    x = torch.randn(9, N, generator=generator)
    sketch = GradientSketch(M, N, size=M, generator=generator, device="cuda")
    moment = InputMoment(N, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        collect_statistics({"layer": layer}, [lambda: layer(x.cuda()).float().square().sum()], {"layer": sketch})
    collect_statistics({"layer": layer}, [lambda: layer(x.cuda()).square().sum()], {"layer": moment})
    assert all(total.device.type == "cuda" for total in (*sketch.sums(), *moment.sums(), *sketch.triplets()))
    torch.testing.assert_close(moment.importance().cpu(), x.T @ x, rtol=1e-5, atol=1e-5)  # full float32, no TF32
