"""A run that diverges ends in that task, writes nothing of it, and can be resumed."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy import toy_stream

import manifold_cl
from manifold_cl import METHODS, ContinualRunner, RunRecord
from manifold_cl.adapters import EBLoRALinear, adapters_of, geometry_metrics, inject_adapters
from manifold_cl.continual import Training, make_method
from manifold_cl.continual import runner as running
from manifold_cl.continual.losses import divergence
from manifold_cl.continual.runner import Progress
from manifold_cl.files import FileError
from manifold_cl.tensor_files import load_tensors

STEPS = 6
"""Of a task of the toy stream in one epoch: 96 examples in batches of 16."""


def make(folder: Path, method: str, **options: Any) -> ContinualRunner:
    own = {field.name for field in fields(METHODS[method])}  # type: ignore[arg-type]
    chosen = {key: value for key, value in {"rank": 4, "statistic_examples": 32, **options}.items() if key in own}
    return ContinualRunner(toy_stream(), make_method(method, **chosen), folder, training=Training())


@contextmanager
def nan_in_gradients_at(number: int) -> Iterator[None]:
    """Inside, one entry of every gradient is NaN at the step of that number."""
    count = 0

    def spoil(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                p.grad.view(-1)[0] = math.nan

    handle = register_optimizer_step_pre_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.trains and name != "joint"])
def test_a_gradient_that_is_nan_in_the_last_step_ends_the_run_in_its_task(method: str, tmp_path: Path) -> None:
    # The hook fires twice per step of a subclass of AdamW (gpm): there it is the third step, which the next loss shows.
    with nan_in_gradients_at(STEPS), pytest.raises(FloatingPointError, match=r"first.*at step [46]"):
        make(tmp_path, method).run()
    assert RunRecord.load(tmp_path).done == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    record = make(tmp_path, method).run(resume=True)
    assert (record.status, len(record.losses)) == ("complete", 3)


def test_joint_training_that_diverges_in_its_last_step_writes_nothing(tmp_path: Path) -> None:
    with nan_in_gradients_at(3 * STEPS), pytest.raises(FloatingPointError, match=r"first.*third.* at step 18"):
        make(tmp_path, "joint").run()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_learned_before_is_kept(tmp_path: Path) -> None:
    with nan_in_gradients_at(3 * STEPS), pytest.raises(FloatingPointError, match="third"):
        make(tmp_path, "sequential_merge").run()
    assert RunRecord.load(tmp_path).done == 2
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [path.parent.name for path in files] == ["01-first", "02-second"]
    assert all(load_tensors(path) for path in files)  # refuses what is not finite


def test_a_merge_that_overflows_ends_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a model with infinite weights still have a largest one, so that its accuracy is a number."""
    method = METHODS["sequential_merge"]
    merge = method.end_task

    def overflowing(self: Any, model: torch.nn.Module, stage: Any) -> None:
        merge(self, model, stage)
        if stage.index == 1:
            model.get_parameter("inner.weight").data[0, 0] = math.inf

    monkeypatch.setattr(method, "end_task", overflowing)
    with pytest.raises(FloatingPointError, match=r"inner\.weight has NaN or infinite .* after the merge of second"):
        make(tmp_path, "sequential_merge").run()
    assert RunRecord.load(tmp_path).done == 1
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["01-first"]
    monkeypatch.undo()
    assert make(tmp_path, "sequential_merge").run(resume=True).status == "complete"


@pytest.mark.parametrize("method", ["sequential_merge", "olora", "ewc_lora", "sequential"])
def test_finite_factors_whose_product_overflows_leave_nothing_of_the_task(method: str, tmp_path: Path) -> None:
    runner = make(tmp_path, method)
    pretrained, models = runner._pretrained_model, []

    def on_progress(state: Progress) -> None:
        if (state.index, state.phase) == (1, "finish"):
            for adapter in adapters_of(models[0]).values():
                adapter.left.data.fill_(1e30)
                adapter.right.data.fill_(1e30)

    runner.on_progress = on_progress
    runner._pretrained_model = lambda: models.append(pretrained()) or models[0]  # type: ignore
    with pytest.raises(ValueError, match=r"inner: merging the update gives NaN or infinite weights"):
        runner.run()
    assert RunRecord.load(tmp_path).done == 1
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["01-first"]
    assert make(tmp_path, method).run(resume=True).status == "complete"


def test_a_folder_that_another_one_replaced_keeps_its_files_when_a_task_fails(tmp_path: Path) -> None:
    runner, folder = make(tmp_path / "run", "sequential_merge"), tmp_path / "run"
    stranger = folder / "tasks/02-second/adapter.safetensors"

    def on_progress(state: Progress) -> None:
        if (state.index, state.phase) == (1, "finish"):
            folder.rename(tmp_path / "moved")
            stranger.parent.mkdir(parents=True)
            stranger.write_text("of another run")
            (folder / "run.lock").touch()

    runner.on_progress = on_progress
    with pytest.raises(FileError, match=r"run\.lock is not the file that this run locked"):
        runner.run()
    assert stranger.read_text() == "of another run"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["eblora", "gpm", "zero_shot"])
def test_a_pre_trained_model_with_a_weight_that_is_not_finite_is_refused_before_anything(
    method: str, value: float, tmp_path: Path
) -> None:
    runner = make(tmp_path, method)
    model = toy_stream().make_model()
    model.get_parameter("head.weight").data[1, 2] = value  # a largest logit exists nevertheless
    runner.stream = replace(runner.stream, make_model=lambda: model)
    with pytest.raises(ValueError, match=r"weight head\.weight of the pre-trained model has NaN or infinite"):
        runner.run()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_all_weights_are_examined_once_before_the_run_and_once_per_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reads = toy_stream().make_model(), 0
    isfinite = torch.Tensor.isfinite

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal reads
        reads += tensor.data_ptr() == model.get_parameter("head.weight").data_ptr()
        return isfinite(tensor)

    monkeypatch.setattr(torch.Tensor, "isfinite", counting)
    runner = make(tmp_path, "sequential_merge")
    runner.stream = replace(runner.stream, make_model=lambda: model)
    runner.run()
    assert reads == 1 + 3


def test_other_errors_of_an_optimizer_keep_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("this optimizer wants something else")

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    with pytest.raises(ValueError, match="wants something else"):
        make(tmp_path, "sequential_merge").run()


def test_unknown_scores_are_recorded_as_unknown_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stage whose scores are all NaN is a stage that was learned, also where the run is resumed."""
    runner = make(tmp_path, "sequential_merge")
    stage: list[int] = [-1]

    def watch(state: Progress) -> None:
        if state.phase == "evaluate":
            stage[0] = state.index
        if (state.phase, state.index) == ("train", 1):
            raise KeyboardInterrupt

    runner.on_progress = watch
    for task in runner.stream.tasks:
        inner = task.scores
        task.scores = lambda model, split="test", inner=inner: {  # type: ignore[method-assign, misc]
            name: math.nan if stage[0] == 0 else value for name, value in inner(model, split).items()
        }
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert "the score accuracy of task second is nan after 1 tasks" in caplog.text
    record = make(tmp_path, "sequential_merge").run(resume=True)
    assert [len(rows) for rows in (record.losses, record.timings, record.accuracy["accuracy"])] == [3, 3, 3]
    assert [math.isnan(row[0]) for row in record.matrix().tolist()] == [True, False, False]
    assert math.isnan(record.metrics["mft"])


def test_constraints_off_by_more_than_training_leaves_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        record = make(tmp_path / "fine", "eblora").run()
    assert "off by" not in caplog.text
    assert all(0 <= error <= running.LARGEST_RESIDUAL for errors in record.constraints for error in errors.values())
    measured = running.measure_constraints
    monkeypatch.setattr(running, "measure_constraints", lambda model: {**measured(model), "protection": 3e-5})
    record = make(tmp_path / "off", "eblora").run()
    assert [errors["protection"] for errors in record.constraints] == [3e-5] * 3
    assert "protection of the frames of task second is off by 3.0e-05, more than 2e-06" in caplog.text


@pytest.mark.parametrize("layer", ["inner", "outer"])
def test_one_frame_with_nan_is_the_worst_of_all(layer: str) -> None:
    model = toy_stream().make_model()
    adapters = inject_adapters(model, ("inner", "outer"), lambda _, linear: EBLoRALinear(linear, 4))
    with torch.no_grad():
        adapters[layer].left[0, 0] = math.nan
    assert math.isnan(running.measure_constraints(model)["orthonormality"])
    assert math.isnan(geometry_metrics(model)["geometry/orthonormality"])


def test_a_clock_that_stands_still_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifold_cl.continual.environment.time.perf_counter", lambda: 1.0)
    record = make(tmp_path, "sequential_merge").run()
    assert [timing["train"] for timing in record.timings] == [0.0, 0.0, 0.0]


def test_a_loss_that_rises_above_its_start_is_named_although_it_is_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, lr, count in (("diverged", 0.3, 1), ("converged", 0.01, 0)):
        caplog.clear()
        method = make_method("sequential", rank=4, lr=lr)
        ContinualRunner(toy_stream(), method, tmp_path / name, training=Training(epochs=4)).run()
        found = [each.getMessage() for each in caplog.records if "the loss rose" in each.getMessage()]
        assert len(found) == count
    first = RunRecord.load(tmp_path / "diverged").losses[0]
    step, lowest, highest = divergence(first, first[0]) or (0, 0.0, 0.0)
    assert highest == pytest.approx(sum(first[step - 3 : step]) / 3)
    assert lowest < first[0] * 1.01 < highest


def test_the_run_on_a_language_model_that_collapsed_is_found_and_its_neighbours_are_not() -> None:
    folder = Path(manifold_cl.__file__).parents[1] / "benchmarks/results/lm-four/cells"
    worst = {}
    for path in folder.glob("*/record.json"):
        losses = RunRecord.load(path.parent).losses
        worst[path.parent.name] = [divergence(each, losses[0][0]) for each in losses]
    (step, _, highest), *others = worst.pop("eblora-seed2")
    assert (step, round(highest)) == (8, 12)
    assert others == [None] * 3
    assert all(rises == [None] * 4 for rises in worst.values())
