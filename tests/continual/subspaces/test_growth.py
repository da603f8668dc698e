"""Growth of a memory by unions, pre-trained weights and earlier models, and EBLoRA's options for them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from toy import HIDDEN, INPUTS, toy_stream

from manifold_cl import ContinualRunner, SubspaceMemory, inject_adapters
from manifold_cl.adapters import LoRALinear, merge_adapters
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual import Training, grow_memory, grow_memory_from_weights, make_method, task_losses
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods import EBLoRA
from manifold_cl.continual.subspaces.growth import parse_sources, weight_directions, without_updates
from manifold_cl.continual.subspaces.layer_columns import PRETRAINING
from manifold_cl.files import FileError

EMPTY = {"inner": INPUTS, "outer": HIDDEN}


def test_sources_are_named_and_joined() -> None:
    assert parse_sources("gradient") == ("gradient",)
    assert parse_sources("gradient + sensitivity") == (
        "sensitivity",
        "gradient",
    )  # in one order, however they are written
    with pytest.raises(ValueError, match=r"source is sensitivity, activation, gradient, or several joined by \+"):
        parse_sources("gradient+weights")
    with pytest.raises(ValueError, match=r"a source is named once, got 'gradient\+gradient'"):
        parse_sources("gradient+gradient")


def test_a_union_holds_the_energy_of_both_sources() -> None:
    stream = toy_stream()
    model = stream.make_model()
    layers = {"inner": model.inner, "outer": model.outer}
    losses = task_losses(model, stream.tasks[0], examples=96)

    def grow(source: str) -> SubspaceMemory:
        empty = SubspaceMemory.empty(EMPTY)
        return grow_memory(empty, layers, losses, source=source, energy=0.8, rank=4, task="first")

    one, other, both = grow("activation"), grow("gradient"), grow("activation+gradient")
    assert both.tasks == ("first",)
    for name in layers:
        assert max(one[name].k, other[name].k) <= both[name].k <= one[name].k + other[name].k
        assert torch.equal(both[name].basis[:, : one[name].k], one[name].basis)  # in order
        again = both.extended(
            {name: other[name].basis.double() @ other[name].basis.double().T}, energy=0.5, rank=4, task="check"
        )
        assert again.growth[name].before > 0.5  # it holds most of the other's directions
        assert both.growth[name].added == both[name].k
        assert both.growth[name].explained >= 0.8 - 1e-6  # the lesser of both; float32


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (11, 11)])
def test_the_directions_of_a_weight_are_its_right_singular_ones(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    weight = torch.randn(shape, generator=generator)
    found = weight_directions(weight, "inner")
    _, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(found.columns.norm(dim=0)[: len(sigma)], sigma, rtol=1e-6, atol=1e-6)  # via squares
    moment = found.columns @ found.columns.T
    torch.testing.assert_close(moment, weight.double().T @ weight.double(), rtol=0, atol=1e-10)  # float64
    assert found.total == pytest.approx(float(sigma.square().sum()), rel=1e-12)  # float64
    cosine = abs(float(vt[0] @ found.columns[:, 0] / sigma[0]))
    assert cosine == pytest.approx(1.0, abs=1e-8)  # the strongest first


def test_protected_weights_are_task_zero_and_drop_the_crossing_column() -> None:
    model = toy_stream().make_model()
    layers = {"inner": model.inner, "outer": model.outer}
    memory = grow_memory_from_weights(SubspaceMemory.empty(EMPTY), layers, rank=4)
    assert memory.tasks == (PRETRAINING,)
    for name, layer in layers.items():
        sigma = torch.linalg.svdvals(layer.weight.double())
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        assert memory[name].k == int((shares < 0.6).sum()) > 0
        assert memory.growth[name].explained < 0.6
        assert memory.growth[name].pace == 0.0  # pre-training is no task
    later = memory.extended({"inner": torch.eye(INPUTS)}, energy=0.5, rank=4, task="first")
    assert later.growth["inner"].pace == float(later.growth["inner"].added)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_pre_trained_weight_that_is_not_finite_is_refused_by_the_name_of_its_layer(value: float) -> None:
    model = toy_stream().make_model()
    model.outer.weight.data[0, 3] = value
    layers = {"inner": model.inner, "outer": model.outer}
    with pytest.raises(ValueError, match="the weight of outer has NaN or infinite entries"):
        grow_memory_from_weights(SubspaceMemory.empty(EMPTY), layers, rank=4)


def test_a_model_without_its_updates_answers_as_before_them(generator: torch.Generator) -> None:
    stream = toy_stream()
    model, original = stream.make_model(), stream.make_model()
    x = torch.randn(5, INPUTS, generator=generator)
    updates = []
    for _ in range(2):
        adapters = inject_adapters(model, ["inner", "outer"], lambda _, la: LoRALinear(la, 2, generator=generator))
        for adapter in adapters.values():
            with torch.no_grad():
                adapter.left.copy_(torch.randn(adapter.left.shape, generator=generator))
        updates.append(merge_adapters(model))
    assert float((model(x) - original(x)).abs().max()) > 0.1
    with without_updates(model, updates):
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)  # float32 sums of updates of size 10
    assert not model.inner._forward_hooks
    with (
        pytest.raises(ValueError, match="an update names 'elsewhere', which is no linear layer of this model"),
        without_updates(model, [{"inner": updates[0]["inner"]}, {"elsewhere": updates[0]["inner"]}]),
    ):
        pass
    assert not model.inner._forward_hooks
    assert isinstance(updates[0]["inner"], Factors)


@pytest.mark.parametrize("rank", [3, HIDDEN])  # at full rank a core on the wrong side has the right shape
@pytest.mark.parametrize("core", ["scalar", "diagonal", "full"])
def test_any_core_of_an_update_is_subtracted(core: str, rank: int, generator: torch.Generator) -> None:
    model, original = toy_stream().make_model(), toy_stream().make_model()
    x = torch.randn(5, INPUTS, generator=generator)
    shape = {"scalar": (), "diagonal": (rank,), "full": (rank, rank)}[core]
    update = Factors(*(torch.randn(s, generator=generator) / 4 for s in ((HIDDEN, rank), (HIDDEN, rank), shape)))
    merge_factors(model, {"outer": update})
    assert float((model(x) - original(x)).abs().max()) > 0.05
    with without_updates(model, [{"outer": update}]):
        torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)  # float32 sums of numbers near 1


@pytest.mark.parametrize("statistics_at", ["merged", "pretrained"])
@pytest.mark.parametrize("rank", [3, HIDDEN - 4])
def test_a_full_core_learns_at_either_model(statistics_at: str, rank: int, tmp_path: Path) -> None:
    method = make_method("restricted", rank=rank, statistics_at=statistics_at, statistic_examples=48, energy=0.3)
    record = ContinualRunner(toy_stream(), method, tmp_path, training=Training()).run()
    assert record.status == "complete"
    assert max(e["protection"] for e in record.constraints) <= 2e-6  # the documented bound


@pytest.mark.parametrize(
    "options",
    [
        {"statistics_at": "pretrained"},
        {"from_weights": 0.3, "policy": "evict", "energy": 0.99},
        {"source": "sensitivity+gradient", "energy": 0.8},
    ],
    ids=["pretrained", "weights", "union"],
)
def test_every_option_of_the_memory_runs_and_resumes_to_the_same_numbers(
    options: dict[str, str | float], tmp_path: Path
) -> None:
    base = {"rank": 3, "lr": 0.03, "scale_lr": 0.1, "statistic_examples": 48}

    def run(folder: Path, tasks: list[str] | None = None) -> ContinualRunner:
        return ContinualRunner(
            toy_stream(tasks=tasks), make_method("eblora", **{**base, **options}), folder, training=Training()
        )

    whole = run(tmp_path / "whole").run()
    assert max(e["protection"] for e in whole.constraints) <= 2e-6  # the documented bound

    class StopError(Exception):
        pass

    def stop(progress: object) -> None:
        if getattr(progress, "index", 0) == 2:
            raise StopError

    first = run(tmp_path / "part")
    first.on_progress = stop
    with pytest.raises(StopError):
        first.run()
    resumed = run(tmp_path / "part").run(resume=True)
    assert resumed.losses == whole.losses
    assert resumed.accuracy == whole.accuracy
    memory = SubspaceMemory.load(next((tmp_path / "part" / "tasks").glob("03-*")))
    assert memory.tasks[-3:] == ("first", "second", "third")
    assert (memory.tasks[0] == PRETRAINING) == ("from_weights" in options)


def test_statistics_at_the_pretrained_model_do_not_see_the_update() -> None:
    """The first task's memory is the same whether or not its update was merged."""
    stream = toy_stream()
    found = []
    for scale in (-0.05, -2.0):
        model = stream.make_model()
        method = EBLoRA(rank=3, initial_scale=scale, statistics_at="pretrained", statistic_examples=48)
        stage = Stage(task=stream.tasks[0], index=0, targets=["inner", "outer"], seed=0, batch_size=16)
        method.begin_task(model, stage)
        method.end_task(model, stage)
        assert method.memory is not None
        assert len(method.updates) == 1
        found.append(method.memory["outer"].basis.double())
    overlap = torch.linalg.svdvals(found[0].T @ found[1])
    assert found[0].shape == found[1].shape
    assert float(overlap.min()) > 0.999  # float32: the update is subtracted from the output it was merged into


def test_a_run_does_not_resume_on_another_model(tmp_path: Path) -> None:
    stream = toy_stream()
    method = make_method("eblora", rank=3, statistic_examples=48)
    ContinualRunner(stream, method, tmp_path, training=Training()).run()
    other = stream.make_model()
    nn.init.orthogonal_(other.inner.weight, generator=torch.Generator().manual_seed(1))
    fresh = make_method("eblora", rank=3, statistic_examples=48)
    with pytest.raises(FileError, match=r"the memory does not fit the model .*inner: its base weight differs"):
        fresh.restore(other, sorted((tmp_path / "tasks").iterdir()))


def test_losses_of_another_kind_are_refused_with_what_to_give() -> None:
    layers = {"0": nn.Linear(6, 4)}
    x, memory = torch.randn(8, 6), SubspaceMemory.empty(layers)
    wrong = [
        ([lambda: layers["0"](x).sum()], "losses is a function that starts a pass over the data, got list"),
        (lambda: [layers["0"](x).sum()], "batch 0 is a Tensor, not a function that returns its loss"),
    ]
    for source in ("sensitivity", "activation", "gradient"):
        for losses, message in wrong:
            with pytest.raises(TypeError, match=message):
                grow_memory(memory, layers, losses, energy=0.9, rank=2, source=source)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"keep free, is a whole number, got 1\.5"):
        grow_memory(memory, layers, lambda: [wrong[0][0][0]], energy=0.9, rank=1.5)  # type: ignore[arg-type, index]
