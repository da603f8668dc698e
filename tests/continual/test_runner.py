"""The loop over tasks on the toy stream: learning, records, and refusals."""

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import INPUTS, SIZES, TASKS, ToyTask, toy_stream

from manifold_cl import ContinualRunner, RunRecord, TaskStream
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.methods import SequentialMerge
from manifold_cl.continual.metrics import METRICS
from manifold_cl.continual.runner import Progress
from manifold_cl.continual.task import Split
from manifold_cl.continual.training_loop import warmup_cosine
from manifold_cl.files import FileError

Make = Callable[..., ContinualRunner]
Records = dict[str, RunRecord]
METHODS = ("eblora", "sequential_merge")


def test_the_protected_method_learns_as_much_and_forgets_less(records: Records) -> None:
    ours, plain, nothing = (records[name].metrics for name in ("eblora", "sequential_merge", "zero_shot"))
    assert nothing["mfn"] < 35  # four classes, untrained
    assert ours["mft"] > 75
    assert plain["mft"] > 70
    assert plain["bwt"] < -10  # tasks on disjoint inputs, forgotten all the same
    assert ours["bwt"] > -5
    assert ours["mfn"] > plain["mfn"] + 10


def test_zero_shot_rows_are_the_zero_shot_scores(records: Records) -> None:
    record = records["zero_shot"]
    for score in ("accuracy", "certainty"):
        assert record.matrix(score).tolist() == [record.zero_shot[score]] * 3
    assert record.metrics["bwt"] == 0.0
    assert record.metrics["zero_shot"] == record.metrics["mfn"]
    assert record.losses == [[], [], []]
    assert all(record.zero_shot == records[name].zero_shot for name in METHODS)


def test_the_constraint_errors_in_the_record_are_small(records: Records) -> None:
    for errors in records["eblora"].constraints:
        assert sorted(errors) == ["orthonormality", "protection"]
        assert 0 < errors["orthonormality"] <= 2e-6  # the documented bound
        assert errors["protection"] <= 2e-6
    assert records["eblora"].constraints[0]["protection"] == 0.0  # nothing is protected from the first task
    assert records["eblora"].constraints[2]["protection"] > 0.0
    assert records["sequential_merge"].constraints == [{}, {}, {}]


def test_the_matrix_holds_the_scores_and_the_metrics_come_from_it(records: Records) -> None:
    record = records["eblora"]
    assert record.primary == "accuracy"
    matrix = record.matrix()
    assert matrix.shape == (3, 3)
    assert np.isfinite(matrix).all()
    for name, figure in METRICS.items():
        assert record.metrics[name] == figure(matrix)
    assert record.metrics["zero_shot"] == np.mean(record.zero_shot["accuracy"])
    assert not np.array_equal(record.matrix("certainty"), matrix)


def test_the_losses_fall_and_there_is_one_a_step(records: Records) -> None:
    steps = 4 * math.ceil(SIZES["train"] / 16)
    for name in METHODS:
        assert [len(losses) for losses in records[name].losses] == [steps] * 3
        for losses in records[name].losses:
            assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_the_memory_grows_and_leaves_room(records: Records) -> None:
    fractions = [filled["mean_fraction"] for filled in records["eblora"].capacity]
    assert fractions == sorted(fractions)
    assert 0.1 < fractions[0] < fractions[2]
    assert all(filled["max_fraction"] <= 1 - 4 / 16 for filled in records["eblora"].capacity)  # k ≤ n − r
    assert records["sequential_merge"].capacity == [{}, {}, {}]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_numbers_and_another_others(
    method: str, runner: Make, records: Records, tmp_path: Path
) -> None:
    global_state = torch.get_rng_state()
    torch.manual_seed(12345)  # what the caller drew before must not matter
    same = runner(tmp_path / "same", method).run()
    other = runner(tmp_path / "other", method, seed=1).run()
    torch.set_rng_state(global_state)
    assert same.losses == records[method].losses
    assert same.accuracy == records[method].accuracy
    assert other.zero_shot == same.zero_shot  # data and model are not what the seed changes
    assert other.losses[0] != same.losses[0]
    assert other.accuracy["certainty"] != same.accuracy["certainty"]


def test_a_run_leaves_the_global_generator_alone(runner: Make, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    runner(tmp_path / "run", epochs=1).run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{"step": "official", "lr": 0.003}, {"source": "gradient"}])
def test_every_setting_of_the_method_learns_within_its_constraints(
    options: dict[str, str | float], runner: Make, records: Records, tmp_path: Path
) -> None:
    record = runner(tmp_path / "run", **options).run()
    assert record.metrics["mft"] > records["zero_shot"].metrics["mft"] + 20
    assert record.losses != records["eblora"].losses
    assert max(error for errors in record.constraints for error in errors.values()) <= 2e-6  # the documented bound
    assert record.config["step"] == options.get("step", "corrected")


def test_progress_tells_every_phase_and_step(runner: Make, tmp_path: Path) -> None:
    seen: list[Progress] = []
    runner(tmp_path / "run", epochs=1, on_progress=seen.append).run()
    phases = [(p.index, p.phase) for p in seen if p.phase != "statistics"]
    order = list(dict.fromkeys(phases))
    learning = [(i, phase) for i in range(3) for phase in ("prepare", "train", "finish", "evaluate")]
    assert order == [(0, "zero-shot"), *learning]
    second = [p for p in seen if (p.index, p.phase) == (1, "train")]
    assert [p.step for p in second] == [1, 2, 3, 4, 5, 6]
    assert {(p.task, p.tasks, p.steps) for p in second} == {("second", 3, 6)}
    assert all(math.isfinite(p.loss) for p in second)
    passes = [p for p in seen if (p.index, p.phase) == (1, "statistics")]  # 96 examples by 16, before and after
    assert [(p.passes, p.step) for p in passes] == 2 * [(1, batch) for batch in range(7)]
    assert {p.steps for p in passes} == {6}
    assert [math.isnan(p.seconds_left) for p in passes] == 2 * [True, *[False] * 6]
    assert passes[-1].seconds_left == 0


class Diverging(ToyTask):
    """Its loss is infinite from the given call on."""

    calls = 0

    def __init__(self, like: ToyTask, *, after: int) -> None:
        self.__dict__.update(like.__dict__)
        self.after = after

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        loss = super().loss(model, batch)
        return loss if self.calls <= self.after else loss * math.inf


def diverging(after: int) -> TaskStream:
    stream = toy_stream()
    second = stream.tasks[1]
    assert isinstance(second, ToyTask)
    tasks = (stream.tasks[0], Diverging(second, after=after), stream.tasks[2])
    return TaskStream(stream.name, tasks, stream.make_model, stream.targets, stream.provenance)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_task_without_examples_is_refused_by_name_before_anything_is_spent(split: Split, tmp_path: Path) -> None:
    """The mean over no example is NaN, and so would be every figure of the run."""
    stream = toy_stream()
    second = copy.copy(stream.tasks[1])
    assert isinstance(second, ToyTask)
    second._data = {**second._data, split: (torch.zeros(0, INPUTS), torch.zeros(0, dtype=torch.long))}
    bare = replace(stream, tasks=(stream.tasks[0], second, stream.tasks[2]))
    training = Training(evaluate_on="test" if split == "train" else split)
    runner = ContinualRunner(bare, SequentialMerge(rank=2), tmp_path / "run", training=training)
    for call in (runner.validate, runner.run):
        with pytest.raises(ValueError, match=rf"stream 'toy' has no {split} examples of second: give each task some"):
            call()
    assert not (tmp_path / "run").exists()
    if split != "train":
        other = Training(evaluate_on="test" if split == "validation" else "validation")
        ContinualRunner(bare, make_method("zero_shot"), tmp_path / "run", training=other).run()
    else:  # a method that does not train needs no training examples
        ContinualRunner(bare, make_method("zero_shot"), tmp_path / "run").run()


@pytest.mark.parametrize(
    ("method", "after", "message"),
    [
        (
            "sequential_merge",
            3,
            "the loss of second became inf at step 4: lower the learning rate; the finished tasks are kept",
        ),
        ("eblora", 6 + 3, "the loss of second became inf at step 4"),  # six batches of statistics come first
        ("eblora", 2, "the loss of batch 2 became inf in a pass for statistics: lower the learning rate"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_finished_tasks(
    method: str, after: int, message: str, runner: Make, records: Records, tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match=message):
        runner(tmp_path / "run", method, stream=diverging(after)).run()
    left = RunRecord.load(tmp_path / "run")
    assert (left.status, left.done) == ("running", 1)
    assert left.losses == records[method].losses[:1]
    record = runner(tmp_path / "run", method).run(resume=True)  # the stream without the fault
    assert record.losses == records[method].losses
    assert record.accuracy == records[method].accuracy


def test_a_rank_above_capacity_stops_with_the_remedy(runner: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 20 does not fit a weight of shape \(16, 24\): choose 1 to 16"):
        runner(tmp_path / "run", rank=20).run()


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_that_holds_a_run_is_not_written_over(method: str, runner: Make, finished: Path) -> None:
    before = (finished / method / "record.json").read_bytes()
    with pytest.raises(FileError, match=rf"{method} holds a run already \(complete\): resume it, or choose another"):
        runner(finished / method, method).run()
    with pytest.raises(FileError, match="holds a run already"):
        runner(finished / method, method).validate()
    assert (finished / method / "record.json").read_bytes() == before


def test_a_run_of_another_configuration_is_refused_with_the_differences(runner: Make, finished: Path) -> None:
    files = {path: path.read_bytes() for path in (finished / "eblora").rglob("*") if path.is_file()}
    message = (
        r"eblora holds a run of another configuration: energy: 0\.9 there, 0\.5 here; "
        r"examples: 'unset' there, 48 here; seed: 0 there, 7 here$"
    )
    changed = runner(finished / "eblora", seed=7, energy=0.5, details={"examples": 48})
    for attempt in (changed.validate, changed.run):
        with pytest.raises(FileError, match=message):
            attempt(resume=True)
    assert {path: path.read_bytes() for path in (finished / "eblora").rglob("*") if path.is_file()} == files


def test_other_tasks_are_another_configuration(runner: Make, finished: Path) -> None:
    message = r"tasks: \['first', 'second', 'third'\] there, \['second', 'first'\] here"
    with pytest.raises(FileError, match=message):
        runner(finished / "eblora", stream=toy_stream(tasks=["second", "first"])).run(resume=True)


def test_a_truncated_record_is_refused_and_kept(runner: Make, finished: Path, tmp_path: Path) -> None:
    content = (finished / "eblora" / "record.json").read_bytes()
    path = tmp_path / "run" / "record.json"
    path.parent.mkdir()
    path.write_bytes(content[: len(content) // 2])
    for resume in (False, True):
        with pytest.raises(FileError, match=r"run/record\.json is damaged or truncated \(.*\): restore it, or delete"):
            runner(path.parent).run(resume=resume)
    assert path.read_bytes() == content[: len(content) // 2]


def test_a_complete_run_is_returned_as_it_is(runner: Make, finished: Path, records: Records) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "eblora").rglob("*")}
    seen: list[Progress] = []
    record = runner(finished / "eblora", on_progress=seen.append).run(resume=True)
    assert record == records["eblora"]
    assert not seen
    assert {path: path.stat().st_mtime_ns for path in (finished / "eblora").rglob("*")} == before


def test_details_of_the_configuration_may_be_tuples(runner: Make, tmp_path: Path) -> None:
    """JSON has lists only: a configuration compares as it is read back."""
    details = {"crop": (3, 4)}
    runner(tmp_path / "run", "zero_shot", details=details).run()
    assert runner(tmp_path / "run", "zero_shot", details=details).run(resume=True).config["crop"] == [3, 4]
    with pytest.raises(TypeError, match="not JSON serializable"):
        runner(tmp_path / "other", "zero_shot", details={"path": tmp_path})
    assert not (tmp_path / "other").exists()


def test_the_configuration_holds_every_option(runner: Make, tmp_path: Path) -> None:
    config = runner(tmp_path).config
    assert set(config) == {
        *("method", "stream", "tasks", "device", "epochs", "batch_size", "warmup", "seed", "evaluate_on"),
        *("rank", "alpha", "lr", "scale_lr", "initial_scale", "energy", "source", "statistic_examples"),
        "step",
        "direction",
        *("statistics_at", "from_weights", "policy"),
        *("initial_scale_last", "scale_decay"),
    }
    assert (config["method"], config["tasks"], config["device"]) == ("eblora", list(TASKS), "cpu")
    assert not any(tmp_path.iterdir())  # making a runner writes nothing
    assert json.loads(json.dumps(config)) == config


def test_the_learning_rate_rises_and_falls(generator: torch.Generator) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 20, warmup=0.2)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5)  # half way down: 8 of 16 steps
    assert rates[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-15)  # after the last step, float64


def test_every_task_trains_on_the_schedule_from_its_start(tmp_path: Path) -> None:
    class Watched(SequentialMerge):
        name = "watched"

        def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            self.optimizer = super().make_optimizer(model)
            return self.optimizer

    method = Watched(rank=2, lr=1.0)
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}

    def watch(state: Progress) -> None:
        if state.phase == "train" and state.step:  # told after the step and its schedule
            rates[state.index].append(method.optimizer.param_groups[0]["lr"])

    ContinualRunner(toy_stream(), method, tmp_path / "run", on_progress=watch).run()
    expected = [0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(6)]  # one step of warm-up, five down
    assert rates[0] == pytest.approx(expected, abs=1e-12)  # float64
    assert rates[1] == rates[2] == rates[0]


def test_a_single_step_has_a_positive_learning_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    warmup_cosine(optimizer, 1, warmup=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_model_that_comes_unfrozen_is_frozen_before_anything_reads_it(tmp_path):
    seen = []

    class Watched(ToyTask):
        def scores(self, model, split="test"):
            seen.append(any(p.requires_grad for p in model.parameters()))
            return super().scores(model, split)

    stream = toy_stream(tasks=["first"], examples=16)
    stream.tasks[0].__class__ = Watched
    free = replace(stream, make_model=lambda: stream.make_model().requires_grad_(True))
    ContinualRunner(free, make_method("sequential_merge", rank=2), tmp_path / "run").run()
    assert seen[0] is False
