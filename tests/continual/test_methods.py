"""The registry of methods, and the methods around one task."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import HIDDEN, INPUTS, toy_stream

from manifold_cl import METHODS, ContinualRunner, EBLoRALinear, Method, TaskStream, adapters_of, register_method
from manifold_cl.adapters import LoRALinear
from manifold_cl.continual import make_method
from manifold_cl.continual.methods import EBLoRA, SequentialMerge, ZeroShot
from manifold_cl.continual.stage import Stage, derive_seed

TARGETS = ["inner", "outer"]


def stage_of(stream: TaskStream, index: int = 0, seed: int = 0) -> Stage:
    return Stage(task=stream.tasks[index], index=index, targets=TARGETS, seed=seed, batch_size=16)


def test_every_method_is_found_by_name() -> None:
    assert METHODS["eblora"] is EBLoRA
    assert METHODS["sequential_merge"] is SequentialMerge
    assert METHODS["zero_shot"] is ZeroShot
    assert all(cls.name == name for name, cls in METHODS.items())
    assert make_method("eblora", rank=3).options()["rank"] == 3
    assert "memory" not in make_method("eblora").options()  # state is no option


def test_an_unknown_method_lists_the_nearest() -> None:
    message = r"unknown method 'ebora', did you mean eblora or e2lora\? \(have: .*zero_shot"
    with pytest.raises(ValueError, match=message):
        make_method("ebora")
    with pytest.raises(ValueError, match=r"unknown method 'xyz' \(have: "):
        make_method("xyz")


def test_an_unknown_option_lists_the_nearest() -> None:
    message = r"unknown option of eblora 'enrgy', did you mean energy\? \(have: rank, alpha, "
    with pytest.raises(ValueError, match=message):
        make_method("eblora", enrgy=0.9)
    with pytest.raises(ValueError, match=r"unknown option of zero_shot 'rank' \(have: none\)"):
        make_method("zero_shot", rank=4)
    with pytest.raises(ValueError, match="unknown option of eblora 'memory'"):
        make_method("eblora", memory=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, r"energy is a share in \(0, 1\], got 0\.0"),
        ({"energy": 1.5}, r"energy is a share in \(0, 1\], got 1\.5"),
        ({"source": "hessian"}, r"source is sensitivity, activation, gradient, or several joined by \+, got 'hessian'"),
        ({"source": "gradient+gradient"}, r"a source is named once, got 'gradient\+gradient'"),
        ({"statistics_at": "start"}, "statistics_at is one of merged, pretrained, got 'start'"),
        ({"from_weights": 1.0}, r"from_weights is a share in \[0, 1\), got 1\.0"),
        ({"policy": "shrink"}, "policy is one of stop, evict, raise, got 'shrink'"),
        ({"step": "newton"}, "step is one of corrected, official, spectral, got 'newton'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("eblora", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "eight"}, "rank is a whole number, got 'eight'"),
        ({"rank": 8.5}, r"rank is a whole number, got 8\.5"),
        ({"rank": True}, "rank is a whole number, got True"),
        ({"alpha": "1e"}, "alpha is a number, got '1e'"),
        ({"step": 3}, "step is text, got 3"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_method("eblora", **options)
    assert make_method("eblora", alpha=8).options()["alpha"] == 8  # a whole number is a number


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="a method named 'eblora' is registered already"):

        @register_method
        class Other(EBLoRA):
            pass

    assert METHODS["eblora"] is EBLoRA


def test_streams_have_tasks_with_names_that_differ(stream: TaskStream) -> None:
    with pytest.raises(ValueError, match="stream 'toy' has no tasks: give at least one"):
        TaskStream("toy", (), stream.make_model, stream.targets)
    with pytest.raises(ValueError, match="task names must differ, got first, first"):
        TaskStream("toy", (stream.tasks[0], stream.tasks[0]), stream.make_model, stream.targets)


@pytest.mark.parametrize("name", ["a/b", "..\\up", "two\nlines", "", " ", ".", "..", "bell\a", "turned\u202e"])
def test_names_of_tasks_can_be_names_of_folders(stream: TaskStream, name: str) -> None:
    task = copy.copy(stream.tasks[0])
    task.name = name
    with pytest.raises(
        ValueError, match=rf"the name of a task is part of a folder's name, .* got {re.escape(repr(name))}"
    ):
        TaskStream("toy", (task,), stream.make_model, stream.targets)
    with pytest.raises(
        ValueError, match=rf"the name of a stream is part of a folder's name, .* {re.escape(repr(name))}"
    ):
        TaskStream(name, stream.tasks, stream.make_model, stream.targets)
    task.name = "日" * 34  # three bytes each
    with pytest.raises(ValueError, match=r"the name of a task .* has at most 100 bytes, got 102"):
        TaskStream("toy", (task,), stream.make_model, stream.targets)
    task.name = 3  # type: ignore[assignment]
    with pytest.raises(TypeError, match="the name of a task is text, got 3"):
        TaskStream("toy", (task,), stream.make_model, stream.targets)
    task.name = "ä ö, ü 日本"
    assert TaskStream("toy", (task,), stream.make_model, stream.targets).task_names == (task.name,)


def test_randomness_depends_on_seed_and_purpose_and_nothing_else(stream: TaskStream) -> None:
    def draw(seed: int, *purpose: object) -> torch.Tensor:
        return torch.rand(4, generator=torch.Generator().manual_seed(derive_seed(seed, *purpose)))

    assert torch.equal(draw(0, 1, "order"), draw(0, 1, "order"))
    different = [draw(0, 1, "order"), draw(1, 1, "order"), draw(0, 2, "order"), draw(0, 1, "sketch")]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    state = torch.get_rng_state()
    stage_of(stream).generator("adapters")
    assert torch.equal(torch.get_rng_state(), state)  # nothing touches the global one


def test_statistics_use_about_the_number_of_examples_in_the_option(stream: TaskStream) -> None:
    model = stream.make_model()
    assert len(list(stage_of(stream).losses(model, 40, "start")())) == 3  # 16 + 16 + 16 ≥ 40
    assert len(list(stage_of(stream).losses(model, 10_000, "start")())) == 6  # 96 training examples
    first = [float(loss().detach()) for loss in stage_of(stream).losses(model, 40, "start")()]
    assert first == [float(loss().detach()) for loss in stage_of(stream).losses(model, 40, "start")()]
    assert first != [float(loss().detach()) for loss in stage_of(stream).losses(model, 40, "memory")()]


def test_eblora_starts_along_the_gradient(stream: TaskStream) -> None:
    """The first frames are the leading singular directions of the dense gradient of the same examples."""
    model = stream.make_model()
    weight = model.inner.weight.requires_grad_(True)
    method = EBLoRA(rank=3, statistic_examples=96)
    losses = torch.stack([loss() for loss in stage_of(stream).losses(model, 96, "start")()])
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    model.requires_grad_(False)
    method.begin_task(model, stage_of(stream))
    adapter = model.inner
    assert isinstance(adapter, EBLoRALinear)
    left, sigma, vt = torch.linalg.svd(gradient)
    assert float(sigma[2] / sigma[3]) > 1.05  # the leading three are well defined
    for found, wanted in ((adapter.left, left[:, :3]), (adapter.right, vt[:3].T)):
        cosines = torch.linalg.svdvals(found.detach().T @ wanted)
        assert float(cosines.min()) > 0.999  # the same subspace, to what a float32 sketch resolves
    assert float(adapter.scale.detach()) == pytest.approx(method.initial_scale)
    assert all(p.grad is None for p in model.parameters())


def test_later_tasks_start_along_what_the_memory_leaves_of_the_gradient(stream: TaskStream) -> None:
    model = stream.make_model()
    method = EBLoRA(rank=3, energy=0.8, statistic_examples=96)
    method.begin_task(model, stage_of(stream))
    method.end_task(model, stage_of(stream))
    weight = model.outer.weight.requires_grad_(True)
    losses = torch.stack([loss() for loss in stage_of(stream, 1).losses(model, 96, "start")()])
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    model.requires_grad_(False)
    assert method.memory is not None
    free = method.memory["outer"].project_out(gradient.T).T
    assert free.norm() < 0.95 * gradient.norm()  # the memory holds a part of it
    method.begin_task(model, stage_of(stream, 1))
    adapter = model.outer
    assert isinstance(adapter, EBLoRALinear)
    left, _, vt = torch.linalg.svd(free)
    for found, wanted in ((adapter.left, left[:, :3]), (adapter.right, vt[:3].T)):
        cosines = torch.linalg.svdvals(found.detach().T @ wanted)
        assert float(cosines.min()) > 0.999  # the same subspace, to what a float32 sketch resolves


@pytest.mark.parametrize("source", ["gradient", "activation", "sensitivity"])
def test_eblora_protects_the_inputs_of_the_task(source: str, stream: TaskStream) -> None:
    """All three sources see that the first task lives in six of the 24 input directions, and no others."""
    model = stream.make_model()
    method = make_method("eblora", rank=4, energy=0.999, source=source, statistic_examples=96)
    assert isinstance(method, EBLoRA)
    assert method.capacity() == {}
    method.begin_task(model, stage_of(stream))
    method.end_task(model, stage_of(stream))
    assert not adapters_of(model)
    assert method.memory is not None
    x = next(stream.tasks[0].batches("test", batch_size=80))[0]
    other = next(stream.tasks[1].batches("test", batch_size=80))[0]
    inner = method.memory["inner"]
    assert 4 <= inner.k <= 6
    assert float(inner.energy_fraction(x.T)) > 0.6
    assert float(inner.energy_fraction(other.T)) < 1e-8  # float32, squared
    assert (method.memory["inner"].n, method.memory["outer"].n) == (INPUTS, HIDDEN)
    capacity = method.capacity()
    assert capacity["mean_fraction"] == pytest.approx((inner.k / INPUTS + method.memory["outer"].k / HIDDEN) / 2)
    assert capacity["max_fraction"] >= capacity["mean_fraction"]
    assert capacity["full_layers"] == float(len(method.memory.full))


def test_a_task_without_gradient_outside_the_memory_still_starts(stream: TaskStream) -> None:
    """The same task again: its gradients lie in what is protected, so the start has no direction to follow."""
    model = stream.make_model()
    method = EBLoRA(rank=4, energy=1.0, source="activation", statistic_examples=96)
    method.begin_task(model, stage_of(stream))
    method.end_task(model, stage_of(stream))
    method.begin_task(model, stage_of(stream))
    for adapter in adapters_of(model).values():
        assert isinstance(adapter, EBLoRALinear)
        assert max(adapter.right_manifold.constraint_error(adapter.right)) <= 2e-6  # the documented bound
        assert max(adapter.left_manifold.constraint_error(adapter.left)) <= 2e-6


def test_a_fresh_restore_forgets_an_unfinished_task(stream: TaskStream) -> None:
    method = EBLoRA(rank=4, statistic_examples=32)
    model = stream.make_model()
    method.begin_task(model, stage_of(stream))
    method.end_task(model, stage_of(stream))
    assert method.memory is not None
    method.restore(stream.make_model(), [])
    assert method.memory is None


def test_sequential_trains_plain_factors_and_merges_them(stream: TaskStream) -> None:
    model = stream.make_model()
    weight = model.inner.weight.detach().clone()
    method = SequentialMerge(rank=2, lr=0.1)
    method.begin_task(model, stage_of(stream))
    assert {type(a) for a in adapters_of(model).values()} == {LoRALinear}
    optimizer = method.make_optimizer(model)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.1, 0.0, 4)
    for batch in stream.tasks[0].batches("train", batch_size=48):
        method.loss(model, stream.tasks[0], batch).backward()
        optimizer.step()
    delta = model.inner.factors().delta_weight()
    method.end_task(model, stage_of(stream))
    assert torch.equal(model.inner.weight, weight + delta)
    assert int(torch.linalg.matrix_rank(delta)) == 2
    assert method.capacity() == {}


def test_zero_shot_has_nothing_to_train() -> None:
    assert not ZeroShot.trains
    with pytest.raises(TypeError, match="zero_shot does not train"):
        ZeroShot().make_optimizer(nn.Linear(1, 1))


def test_a_method_that_saves_and_restores_is_where_it_was(tmp_path: Path) -> None:
    stream = toy_stream()
    model, method = stream.make_model(), EBLoRA(rank=4, statistic_examples=96, initial_scale=-0.3)
    folders = []
    for index in range(2):
        folders.append(tmp_path / str(index))
        stage = stage_of(stream, index)
        method.begin_task(model, stage)
        method.save_update(model, folders[-1], stage)
        method.end_task(model, stage)
        method.save_state(folders[-1], stage)
    other, twin = stream.make_model(), EBLoRA(rank=4, statistic_examples=96, initial_scale=-0.3)
    twin.restore(other, folders)
    assert torch.equal(other.inner.weight, model.inner.weight)
    assert torch.equal(other.outer.weight, model.outer.weight)
    assert method.memory is not None
    assert twin.memory is not None
    assert all(torch.equal(twin.memory[name].basis, method.memory[name].basis) for name in TARGETS)


def test_methods_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Method()  # type: ignore[abstract]


@pytest.mark.parametrize("name", ["x" * 300, "🙂" * 80, "a/b", "../../b", "/b", "", "a\0b", "a\udc80"])
def test_a_task_that_is_renamed_later_is_refused_before_anything_is_trained(
    name: str, stream: TaskStream, tmp_path: Path
) -> None:
    stream.tasks[1].name = name
    with pytest.raises(ValueError, match="the name of a task is part of a folder's name"):
        ContinualRunner(stream, make_method("zero_shot"), tmp_path / "run")
    stream.tasks[1].name = stream.tasks[0].name
    with pytest.raises(ValueError, match="task names must differ"):
        ContinualRunner(stream, make_method("zero_shot"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
