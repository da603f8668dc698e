"""Protected and leading directions of a model: budgets, growing sketches, and no dense tensors."""

import logging
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import HIDDEN, INPUTS, frozen_model, toy_stream

from manifold_cl import ProtectedSubspace, SubspaceMemory
from manifold_cl.continual import measure_importance, task_directions, task_losses
from manifold_cl.continual.subspaces import directions
from manifold_cl.continual.subspaces.directions import ImportanceMeasurement, LeadingDirections, leading_directions
from manifold_cl.continual.subspaces.gradient_sketches import RangeSketch
from manifold_cl.continual.subspaces.growth import grow_memory
from manifold_cl.continual.subspaces.input_moments import InputMoment
from manifold_cl.continual.subspaces.passes import Passes
from manifold_cl.continual.subspaces.statistic import Directions

WIDTHS = (29, 43, 37, 31)


class Net(nn.Module):
    """Three linear layers of odd shapes; inputs with a decaying spectrum."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(WIDTHS))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def layers(net: Net) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture
def losses(net: Net) -> Callable[[], Iterator[Callable[[], Tensor]]]:
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(3, 40, WIDTHS[0], generator=draw) / torch.arange(1, WIDTHS[0] + 1.0)

    def start() -> Iterator[Callable[[], Tensor]]:
        for part in x:
            yield lambda part=part: (net(part)[:, :20] - part[:, :20]).square().sum()

    return start


def dense_gradient(net: Net, losses: Any, name: str) -> Tensor:
    weight = net.get_parameter(f"{name}.weight").requires_grad_(True)
    total = torch.stack([loss() for loss in losses()]).sum()
    (gradient,) = torch.autograd.grad(total, weight)
    weight.requires_grad_(False)
    return gradient


def total_energy(found: Any) -> float:
    return float(found.diagonal().sum()) if isinstance(found, Tensor) else found.total


def test_leading_directions_are_those_of_the_dense_gradient(net: Net, layers: Any, losses: Any) -> None:
    found = leading_directions(layers, losses, 3, passes=Passes(per_sketch=2))
    assert list(found) == list(layers)
    for name, (left, sigma, right) in found.items():
        u, s, vt = torch.linalg.svd(dense_gradient(net, losses, name))
        assert (left.shape[1], sigma.shape, right.shape[1]) == (3, (3,), 3)
        assert float(torch.linalg.svdvals(left.T.float() @ u[:, :2])[-1]) > 0.99  # two lead, the third follows close
        assert float(torch.linalg.svdvals(right.T.float() @ vt[:2].T)[-1]) > 0.99  # the same
        torch.testing.assert_close(sigma[:2].float(), s[:2], rtol=0.02, atol=0)  # twelve of about thirty directions


def test_task_directions_start_off_what_is_protected() -> None:
    stream = toy_stream()
    model = stream.make_model()
    draw = torch.Generator().manual_seed(0)
    memory = SubspaceMemory(
        {
            "inner": ProtectedSubspace.from_directions(torch.randn(INPUTS, 5, generator=draw)),
            "outer": ProtectedSubspace.empty(HIDDEN),
        }
    )
    found = task_directions(model, stream.tasks[0], ["inner", "outer"], 3, memory, examples=48)
    assert {name: tuple(triplet.right.shape) for name, triplet in found.items()} == {"inner": (24, 3), "outer": (16, 3)}
    right = found["inner"].right
    assert float((memory["inner"].basis.double().T @ right).abs().max()) < 1e-5  # float32
    torch.testing.assert_close(right.T @ right, torch.eye(3).double(), rtol=0, atol=1e-10)  # float64 orthonormalisation
    again = task_directions(model, stream.tasks[0], ["inner", "outer"], 3, memory, examples=48)
    assert torch.equal(again["inner"].right, right)  # one seed, one result
    other = task_directions(model, stream.tasks[0], ["inner"], 3, memory, examples=48, seed=1)
    assert not torch.equal(other["inner"].right, right)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_bad_targets_ranks_and_data_are_refused() -> None:
    stream = toy_stream()
    model = stream.make_model()
    with pytest.raises(ValueError, match="no linear module matches target 'iner'; nearest: inner"):
        task_directions(model, stream.tasks[0], ["iner"], 3)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        task_directions(model, stream.tasks[0], ["inner"], 0)
    with pytest.raises(ValueError, match="there is no batch to collect statistics from"):
        task_directions(model, stream.tasks[0], ["inner"], 3, examples=0)
    losses = task_losses(model, stream.tasks[0], examples=16)
    with pytest.raises(ValueError, match="source is sensitivity, activation, gradient, got 'hessian'"):
        measure_importance({}, losses, source="hessian", energy=0.9)  # type: ignore[arg-type]
    conv: Any = {"inner": nn.Conv1d(3, 4, 1)}
    with pytest.raises(TypeError, match="statistics are taken of linear layers, inner is a Conv1d"):
        leading_directions(conv, losses, 2)
    with pytest.raises(ValueError, match="per_sketch is 1 or 2, got 3"):
        Passes(per_sketch=3)  # type: ignore[arg-type]


def test_losses_are_the_same_at_every_start() -> None:
    stream = toy_stream()
    model = stream.make_model()
    losses = task_losses(model, stream.tasks[0], examples=40, batch_size=16)
    first = [float(loss()) for loss in losses()]
    assert len(first) == 3  # the first number of batches that holds 40
    assert [float(loss()) for loss in losses()] == first


@pytest.mark.parametrize("source", ["activation", "sensitivity", "gradient"])
def test_a_budget_means_more_passes_and_the_same_numbers(
    source: Any, layers: Any, losses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "EXACT", 0)  # sketches even of small layers
    passes: list[int] = []

    def run(budget: int | None) -> dict[str, Any]:
        passes.clear()
        options = Passes(
            memory_budget=budget, size=8, max_size=8, per_sketch=1, on_batch=lambda count, batch: passes.append(count)
        )
        return dict(measure_importance(layers, losses, source=source, energy=0.5, passes=options))

    free = run(None)
    assert passes == [1, 1, 1]  # three batches, once
    measurement = ImportanceMeasurement(source, energy=0.5, seed=0, size=8, per_sketch=1)
    need = {name: measurement.nbytes(la, 8) + measurement.shared_nbytes([la], 8) for name, la in layers.items()}
    tight = run(max(need.values()))
    assert max(passes) == 3  # one layer at a time
    for name in layers:
        assert total_energy(tight[name]) == pytest.approx(total_energy(free[name]), rel=1e-6)  # the same sums
        assert torch.equal(tight[name].columns, free[name].columns)
    middle = run(sum(sorted(need.values())[:2]))
    assert 1 < max(passes) <= 3
    assert all(torch.equal(middle[name].columns, free[name].columns) for name in layers)
    with pytest.raises(ValueError, match=r"the statistic of layers\.0 alone takes \d+ bytes, the memory budget is 100"):
        run(100)


def test_what_a_statistic_is_said_to_take_is_what_it_takes(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[Any] = [
        ImportanceMeasurement("activation", energy=0.9, seed=0),
        ImportanceMeasurement("gradient", energy=0.9, seed=0, per_sketch=1),
    ]
    for exact in (0, 2048):
        monkeypatch.setattr(directions, "EXACT", exact)
        for measurement in recipes:
            for name, layer in layers.items():
                assert measurement.statistic(name, layer, 8).nbytes() == measurement.nbytes(layer, 8)
    own = LeadingDirections(2, protected={}, generator=torch.Generator(), size=8)
    layer = layers["layers.0"]
    shared = own.statistic("layers.0", layer, 8)
    assert own.nbytes(layer, 8) > 2.5 * shared.nbytes()  # test matrices of its own
    assert own.shared_nbytes([layer], 8) == 0
    twice = LeadingDirections(2, protected={}, generator=torch.Generator(), size=8, per_sketch=2)
    first = twice.statistic("layers.0", layer, 8)
    assert isinstance(first, RangeSketch)
    second = first.refined()
    assert first.nbytes() <= twice.nbytes(layer, 8)
    assert second.nbytes() + 4 * (WIDTHS[1] * 8 + WIDTHS[0] * 10) == twice.nbytes(layer, 8)  # with P and the checks
    assert twice.shared_nbytes([layer, layer], 8) == 4 * (WIDTHS[0] * 8 + WIDTHS[1] * 10)


def test_sketches_grow_until_they_hold_the_energy(layers: Any, losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "EXACT", 0)
    passes: list[int] = []
    options = Passes(per_sketch=1, size=2, on_batch=lambda count, batch: passes.append(count))
    found = dict(measure_importance(layers, losses, source="gradient", energy=0.95, passes=options))
    assert max(passes) > 1
    assert all(isinstance(f, Directions) and f.captured >= 0.95 for f in found.values())
    assert (
        len({f.columns.shape[1] for f in found.values() if isinstance(f, Directions)} - {2, 4, 8, 16, 31, 37, 29}) == 0
    )


def test_a_sketch_at_its_cap_says_that_it_holds_less(
    layers: Any, losses: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directions, "EXACT", 0)
    memory = SubspaceMemory.empty({name: layer.in_features for name, layer in layers.items()})
    with caplog.at_level(logging.WARNING, logger="manifold_cl"):
        memory = grow_memory(
            memory,
            layers,
            losses,
            source="gradient",
            energy=0.999,
            rank=2,
            passes=Passes(size=2, max_size=2),
        )
    assert "layers.0: a sketch of size 2 holds less energy than the threshold" in caplog.text
    growth = memory.growth["layers.0"]
    assert growth.captured < 0.999
    assert growth.explained < growth.threshold == 0.999
    assert growth.added == 2


def test_wide_layers_are_sketched_and_narrow_ones_exact(layers: Any, losses: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(directions, "EXACT", 30)
    measurement = ImportanceMeasurement("activation", energy=0.9, seed=0, size=4)
    kinds = {name: type(measurement.statistic(name, la, 4)).__name__ for name, la in layers.items()}
    assert kinds == {"layers.0": "InputMoment", "layers.1": "InputSketch", "layers.2": "InputSketch"}
    assert isinstance(
        measurement.statistic("layers.1", layers["layers.1"], 22), InputMoment
    )  # half of 43: no saving left


def test_each_pass_drops_its_statistics_before_the_next(layers: Any, losses: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(directions, "EXACT", 0)
    measurement = ImportanceMeasurement("gradient", energy=0.1, seed=0, size=4)
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    original = measurement.statistic

    def statistic(*arguments: Any) -> Any:
        one = original(*arguments)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(measurement, "statistic", statistic)
    need = max(measurement.nbytes(la, 4) + measurement.shared_nbytes([la], 4) for la in layers.values())
    options = Passes(memory_budget=need, on_batch=lambda *_: alive.append(sum(one() is not None for one in made)))
    for _name, _found in directions.run_passes(layers, losses, measurement, options):
        pass
    assert (
        sum(t.nbytes for t in measurement._probes._drawn.values()) <= 4 * max(WIDTHS) * 10
    )  # the checks of the last layer, in its second pass
    assert set(alive) == {0, 1}  # a range sketch is deleted before the second pass


class Allocations(TorchDispatchMode):
    """Shapes of all tensors that operations return in memory that is no weight's."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.own = {weight.untyped_storage().data_ptr() for weight in weights}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("per_sketch", [1, 2])
@pytest.mark.parametrize("source", ["activation", "sensitivity", "gradient"])
def test_no_tensor_of_a_weights_shape_is_allocated(
    source: Any, per_sketch: Any, net: Net, layers: Any, losses: Any
) -> None:
    weights = [layer.weight for layer in layers.values()]
    shapes = {shape for w in weights for shape in (tuple(w.shape), tuple(w.shape[::-1]))}
    memory = SubspaceMemory.empty({name: layer.in_features for name, layer in layers.items()})
    with Allocations(weights) as seen:
        starts = leading_directions(layers, losses, 2, memory, passes=Passes(per_sketch=per_sketch))
        memory = grow_memory(
            memory,
            layers,
            losses,
            source=source,
            energy=0.8,
            rank=2,
            passes=Passes(size=12, max_size=12),
        )
    assert len(seen.shapes) > 30
    assert not seen.shapes & shapes
    assert len(starts) == len(memory) == 3
    with Allocations(weights) as seen:  # the test of the test: a dense gradient would be seen
        dense_gradient(net, losses, "layers.1")
    assert tuple(layers["layers.1"].weight.shape) in seen.shapes


def test_a_model_in_float64_is_summed_in_float64() -> None:
    stream = toy_stream()
    model = frozen_model().double()
    x, y = next(stream.tasks[0].batches("train", batch_size=48))
    layers = {"inner": model.inner, "outer": model.outer}
    losses = lambda: [lambda: nn.functional.cross_entropy(model(x.double()), y)]  # noqa: E731 - a pass of one batch
    found = dict(measure_importance(layers, losses, source="activation", energy=0.9))
    moment = found["inner"]
    assert isinstance(moment, Tensor)
    torch.testing.assert_close(moment, x.double().T @ x.double(), rtol=1e-12, atol=1e-12)  # float64, one product
