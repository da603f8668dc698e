"""The statistic of the last training steps: what it protects, beside a pass after training; its options and errors."""

from pathlib import Path

import pytest
import torch
from test_shared_inputs import Attention, batches, layers_of
from torch import Tensor, nn
from toy import toy_stream

from manifold_cl import ContinualRunner, SubspaceMemory
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual import Training, grow_memory, make_method, task_losses
from manifold_cl.continual.subspaces import Passes, TrainingStatistics, measure_importance

OPTIONS = {"rank": 4, "alpha": 8.0, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistic_examples": 96}


def run(folder: Path, **options: object) -> ContinualRunner:
    method = make_method("eblora", **{**OPTIONS, **options})
    return ContinualRunner(toy_stream(), method, folder, training=Training(epochs=4))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_frozen_weights_give_the_statistic_of_a_pass(shared: bool, checkpoint: bool) -> None:
    model, passes = Attention(checkpoint=checkpoint), Passes(shared_inputs=shared)
    layers = layers_of(model)
    expected = dict(
        measure_importance(
            layers, lambda: [lambda x=x: model(x) for x in batches()], source="sensitivity", energy=0.9, passes=passes
        )
    )
    statistics = TrainingStatistics(layers, energy=0.9, passes=passes)
    for x in batches():
        with statistics.collecting():
            loss = model(x)
            loss.backward()  # type: ignore[no-untyped-call]
    assert statistics.batches == 3
    model(batches()[0]).backward()  # outside: not counted
    found = dict(statistics.importances())
    assert all(torch.equal(found[name], expected[name]) for name in layers)  # type: ignore[arg-type]
    assert all(not layer._forward_hooks for layer in layers.values())


def test_the_protected_subspace_is_near_that_of_a_pass(tmp_path: Path) -> None:
    """Weights move in the last quarter of the steps, whose learning rate falls to zero."""
    runner = run(tmp_path / "run", statistics_during=0.25)
    record = runner.run()
    assert max(error for errors in record.constraints for error in errors.values()) <= 2e-6  # the documented bound
    stream = toy_stream()
    model = stream.make_model()
    runner.method.restore(model, [tmp_path / "run" / "tasks" / "01-first"])
    layers = target_linears(model, stream.targets)
    losses = task_losses(model, stream.tasks[0], examples=96)
    memory = grow_memory(SubspaceMemory.empty(layers), layers, losses, energy=0.9, rank=4)
    moments = dict(measure_importance(layers, losses, source="sensitivity", energy=0.9))
    first = SubspaceMemory.load(tmp_path / "run" / "tasks" / "01-first")
    for name, subspace in first.items():
        moment = moments[name]
        assert isinstance(moment, Tensor)
        captured = float(((moment @ subspace.basis) * subspace.basis).sum() / moment.diagonal().sum())
        assert captured >= 0.87  # of the 0.9 that the pass holds
        assert abs(subspace.k - memory[name].k) <= 1
        few = min(subspace.k, memory[name].k)
        angles = torch.linalg.svdvals(subspace.basis.mT @ memory[name].basis)[: few - 1].clamp(max=1).acos()
        assert float(angles.max()) < 0.35  # radians, all but the direction at the threshold


def test_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    record = run(tmp_path / "run", statistics_during=0.5, shared_inputs=True).run()
    interrupted = run(tmp_path / "other", statistics_during=0.5, shared_inputs=True)

    def stop(state: object) -> None:
        if (state.index, state.phase, state.step) == (1, "train", 20):  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    interrupted.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    again = run(tmp_path / "other", statistics_during=0.5, shared_inputs=True).run(resume=True)
    assert again.accuracy == record.accuracy
    assert again.losses == record.losses
    assert record.config["statistics_during"] == 0.5


def test_a_basis_that_layers_share_counts_once_in_the_record(tmp_path: Path) -> None:
    runner = run(tmp_path / "run", statistics_during=0.5)
    record = runner.run()
    bases = [tensor for tensor in runner.method.state() if tensor.numel()]
    assert record.stored["state"] == sum(tensor.nbytes for tensor in bases)
    runner.method.state = lambda: [*bases, *bases]  # type: ignore[method-assign]
    assert runner._storage()["state"] == record.stored["state"]


def test_fewer_examples_for_the_start_change_the_start_alone(tmp_path: Path) -> None:
    passes: list[tuple[str, int]] = []
    runner = run(tmp_path / "run", start_examples=32)
    runner.on_progress = lambda state: passes.append((state.task, state.steps)) if state.phase == "statistics" else None
    runner.run()
    assert dict.fromkeys(passes) == dict.fromkeys((task, n) for task in ("first", "second", "third") for n in (2, 6))
    assert "start_examples" not in make_method("eblora").options()


def test_what_cannot_be_collected_is_refused() -> None:
    with pytest.raises(ValueError, match=r"statistics_during=0.5 .* got source='activation\+gradient'"):
        make_method("eblora", statistics_during=0.5, source="activation+gradient")
    with pytest.raises(ValueError, match=r"statistics_during=0.5 .* statistics_at='pretrained'"):
        make_method("eblora", statistics_during=0.5, statistics_at="pretrained")
    with pytest.raises(ValueError, match="statistics_during"):
        make_method("eblora", statistics_during=1.5)
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}
    statistics = TrainingStatistics(layers, energy=0.9)
    with pytest.raises(ValueError, match="nothing was collected"):
        dict(statistics.importances())
    with statistics.collecting():
        layers["a"](torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"no gradient reached 1 of 2 layers \(b\)"):
        dict(statistics.importances())
    with pytest.raises(ValueError, match="source is sensitivity, activation, gradient, got 'outputs'"):
        TrainingStatistics(layers, source="outputs", energy=0.9)  # type: ignore[arg-type]


def test_few_tokens_of_a_wide_layer_protect_what_their_moment_would() -> None:
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(1024, 4)
    x = torch.randn(90, 6, generator=draw) @ torch.randn(6, 1024, generator=draw)
    x += 0.02 * torch.randn(90, 1024, generator=draw)
    statistics = TrainingStatistics({"wide": layer}, energy=0.97)
    with statistics.collecting():
        layer(x).square().sum().backward()  # type: ignore[no-untyped-call]
    importances = dict(statistics.importances())
    memory = SubspaceMemory.empty({"wide": layer}).extended(importances, energy=0.97, rank=4)
    weight = (2 * layer(x)).norm(dim=1, keepdim=True)  # of the gradient of the squared outputs
    moment = (weight * x).mT @ (weight * x)
    dense = SubspaceMemory.empty({"wide": layer}).extended({"wide": moment.detach()}, energy=0.97, rank=4)
    assert memory["wide"].k == dense["wide"].k == 6
    angles = torch.linalg.svdvals(memory["wide"].basis.mT @ dense["wide"].basis)
    assert float(angles.min()) > 1 - 1e-5  # float32 sums
    assert memory.growth["wide"].explained == pytest.approx(dense.growth["wide"].explained, abs=1e-5)


def test_the_cheaper_preset_is_eblora_with_its_options(tmp_path: Path) -> None:
    best, other = make_method("best").options(), make_method("eblora").options()
    differing = {name: (value, other.get(name)) for name, value in best.items() if value != other.get(name)}
    assert differing == {"energy": (0.99, 0.97), "start_examples": (32, None), "statistics_during": (0.034, None)}
    runs = []
    for name in ("best", "eblora"):
        options = {**OPTIONS, **{key: pair[0] for key, pair in differing.items()}}
        runner = ContinualRunner(
            toy_stream(), make_method(name, **options), tmp_path / name, training=Training(epochs=4)
        )
        runs.append(runner.run())
    assert runs[0].losses == runs[1].losses
    assert runs[0].accuracy == runs[1].accuracy
