"""`ContinualTrainer`: tasks in transformers' Trainer give the runs that `ContinualRunner` gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_decoder import decoder  # noqa: E402
from tiny_tasks import arguments, task, tasks, trainer  # noqa: E402
from toy import Int8Linear, toy_stream  # noqa: E402
from transformers import Trainer  # noqa: E402

from analysis import AdapterSet  # noqa: E402
from manifold_cl import METHODS, ContinualRunner, RunRecord, SubspaceMemory, searched_rates  # noqa: E402
from manifold_cl.adapters import kept_updates  # noqa: E402
from manifold_cl.continual import Training, make_method  # noqa: E402
from manifold_cl.continual.runner import Progress  # noqa: E402
from manifold_cl.continual.training_loop import warmup_cosine  # noqa: E402
from manifold_cl.integrations.transformers import ContinualTrainer  # noqa: E402

FAST = ("eblora", "gpm", "joint", "olora")
TWO_EPOCHS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}


class KilledError(Exception):
    """Stands for a process that ends."""


def killer(index: int, phase: str, step: int = 0) -> Callable[[Progress], None]:
    def on_progress(state: Progress) -> None:
        if (state.index, state.phase, state.step) == (index, phase, step):
            raise KilledError

    return on_progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ContinualTrainer:
    """A complete run of two epochs per task, six steps each."""
    folder = tmp_path_factory.mktemp("finished")
    made = trainer(folder, args=arguments(folder, **TWO_EPOCHS))
    made.train()
    return made


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in sorted(METHODS)]
)
def test_every_method_runs_and_leaves_the_record_of_a_run(name: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, name)
    record = made.train()
    assert record.status == "complete"
    assert RunRecord.load(tmp_path).accuracy == record.accuracy
    steps = {"zero_shot": [0, 0], "joint": [6, 0]}.get(name, [3, 3])
    assert [len(losses) for losses in record.losses] == steps
    assert all(losses[-1] < losses[0] for losses in record.losses if losses)
    assert record.matrix().shape == (2, 2)
    assert not list(tmp_path.glob("tasks/*/checkpoints"))
    assert made.model is not None
    assert not any(p.requires_grad for p in made.model.parameters())
    assert not made.model.training


@pytest.mark.slow
def test_a_task_of_any_kind_gives_the_bits_of_the_projects_own_loop(tmp_path: Path) -> None:
    """Same batches, same loss, same schedule: every loss and every score of `ContinualRunner`."""

    class Scheduled(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = warmup_cosine(self.optimizer, num_training_steps, warmup=0.1)
            return self.lr_scheduler

    def method() -> Any:
        return make_method("eblora", rank=4, alpha=8.0, lr=0.03, energy=0.9)

    expected = ContinualRunner(
        toy_stream(), method(), tmp_path / "runner", training=Training(epochs=2, seed=5, accumulation=2)
    ).run()
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "seed": 5}
    args = arguments(tmp_path / "trainer", **options, max_grad_norm=0.0)
    made = ContinualTrainer(None, toy_stream(), method(), args, trainer_class=Scheduled)
    record = made.train()
    assert record.losses == expected.losses
    assert record.accuracy == expected.accuracy
    assert record.constraints == expected.constraints
    assert (record.stream, record.config["trainer"]) == ("toy", "Scheduled")


def test_the_loss_is_that_of_the_task(tmp_path: Path) -> None:
    one = task("colour", examples=8)
    record = trainer(tmp_path, "sequential_merge", tasks=[one]).train()
    assert record.losses[0][0] == pytest.approx(one.loss(decoder(), one.part("train")).item(), rel=1e-5)  # float32


@pytest.mark.slow
def test_what_a_method_adds_to_the_loss_comes_once_per_step(tmp_path: Path) -> None:
    method = {"name": "olora", "rank": 4, "orthogonality": 0.5}
    losses = []
    for size, accumulated in ((8, 1), (4, 2)):
        folder = tmp_path / str(size)
        args = arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        losses.append(trainer(folder, method, args=args, tasks=tasks(examples=8)).train().losses)
    assert losses[0][1][0] > losses[0][0][0] + 5  # the penalty of the second task
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-4)  # float32 sums in another order


@pytest.mark.parametrize(
    "moment",
    [
        (1, "train", 5),
        *(pytest.param(m, marks=pytest.mark.slow) for m in ((1, "evaluate", 1), (0, "train", 3), (1, "prepare", 0))),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    moment: tuple[int, str, int], finished: ContinualTrainer, tmp_path: Path
) -> None:
    killed = trainer(tmp_path, args=arguments(tmp_path, **TWO_EPOCHS))
    killed.on_progress(killer(*moment))
    with pytest.raises(KilledError):
        killed.train()
    torch.manual_seed(12345)  # a new process would be elsewhere
    steps: list[tuple[int, int]] = []
    resumed = trainer(tmp_path, args=arguments(tmp_path, **TWO_EPOCHS))
    resumed.on_progress(lambda p: steps.append((p.index, p.step)) if p.phase == "train" else None)
    record, expected = resumed.train(resume=True), finished.record
    assert expected is not None
    for key in ("losses", "accuracy", "constraints", "capacity", "config"):
        assert getattr(record, key) == getattr(expected, key), key
    first = {"train": (moment[0], moment[2] - (moment[2] - 1) % 2), "evaluate": None, "prepare": (1, 1)}[moment[1]]
    assert (steps[0] if steps else None) == first  # goes on after the last checkpoint, and not from the first step
    for path in sorted(finished.folder.rglob("*.safetensors")):
        assert (tmp_path / path.relative_to(finished.folder)).read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_passed_over(finished: ContinualTrainer, tmp_path: Path) -> None:
    killed = trainer(tmp_path, args=arguments(tmp_path, **TWO_EPOCHS))
    killed.on_progress(killer(0, "train", 5))
    with pytest.raises(KilledError):
        killed.train()
    (tmp_path / "tasks/01-colour/checkpoints/checkpoint-4/losses.json").unlink()  # written last
    record = trainer(tmp_path, args=arguments(tmp_path, **TWO_EPOCHS)).train(resume=True)
    assert finished.record is not None
    assert record.losses == finished.record.losses


@pytest.mark.slow
def test_a_checkpoint_holds_what_trains_and_nothing_of_the_base(tmp_path: Path) -> None:
    args = arguments(tmp_path, **TWO_EPOCHS)
    killed = trainer(tmp_path, args=args)
    killed.on_progress(killer(0, "train", 3))
    with pytest.raises(KilledError):
        killed.train()
    (checkpoint,) = tmp_path.glob("tasks/01-colour/checkpoints/*")
    names = {path.name for path in checkpoint.iterdir()}
    assert {"trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "losses.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}


def test_a_complete_run_gives_its_model_again(finished: ContinualTrainer) -> None:
    again = trainer(finished.folder, args=arguments(finished.folder, **TWO_EPOCHS))
    assert again.train(resume=True).losses == finished.record.losses  # type: ignore[union-attr]
    assert again.model is not None
    assert finished.model is not None
    assert all(map(torch.equal, again.model.parameters(), finished.model.parameters()))


def test_the_run_is_read_by_the_analysis(finished: ContinualTrainer) -> None:
    adapters = AdapterSet.load(finished.folder)
    assert list(adapters.tasks) == ["colour", "number"]
    assert finished.history[0][0]["step"] > 0


@pytest.mark.slow
def test_kept_updates_leave_the_weights_alone(finished: ContinualTrainer, tmp_path: Path) -> None:
    made = trainer(tmp_path, keep=True, args=arguments(tmp_path, **TWO_EPOCHS))
    record = made.train()
    assert finished.record is not None
    for ours, theirs in zip(record.losses, finished.record.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)  # float32 sums in another order
    assert made.model is not None
    before = decoder().state_dict()
    assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
    assert {len(updates) for updates in kept_updates(made.model).values()} == {2}
    assert record.config["merge"] == "keep"


def quantised() -> nn.Module:
    model = decoder()
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, Int8Linear(getattr(block.self_attn, name)))
    return model


@pytest.mark.slow
def test_a_quantised_base_is_kept_and_never_merged(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match=r"q_proj is quantised.*merge='keep'"):
        trainer(tmp_path / "merge", model=quantised, targets=targets).train()
    assert not list((tmp_path / "merge").glob("tasks/*"))
    record = trainer(tmp_path / "keep", model=quantised, targets=targets, keep=True).train()
    assert all(losses[-1] < losses[0] for losses in record.losses)


def test_evaluation_by_likelihood_and_loss(tmp_path: Path) -> None:
    for way in ("likelihood", "loss"):
        record = trainer(tmp_path / way, "zero_shot", score_by=way).train()
        assert record.config["score_by"] == way
        assert list(record.accuracy) == {"likelihood": ["score"], "loss": ["score", "perplexity"]}[way]
        assert record.zero_shot["score"][0] > 0
    with pytest.raises(ValueError, match=r"score_by='loss'.*first"):
        ContinualTrainer(None, toy_stream(), "zero_shot", folder=tmp_path / "toy", score_by="loss")


def test_progress_has_every_phase(tmp_path: Path) -> None:
    seen: list[str] = []
    made = trainer(tmp_path, tasks=tasks("colour"))
    made.on_progress(lambda p: seen.append(p.phase))
    made.train()
    assert list(dict.fromkeys(seen)) == ["zero-shot", "prepare", "statistics", "train", "finish", "evaluate"]


@pytest.mark.slow
def test_evaluation_during_a_task_uses_its_validation_examples(tmp_path: Path) -> None:
    args = arguments(tmp_path, eval_strategy="epoch")
    made = trainer(tmp_path, args=args)
    made.train()
    assert ["eval_loss" in entry for history in made.history for entry in history].count(True) == 2
    with pytest.raises(ValueError, match=r"eval_strategy='epoch'.*'first'"):
        ContinualTrainer(None, toy_stream(), {"name": "eblora", "rank": 4}, arguments(tmp_path, eval_strategy="epoch"),
                         folder=tmp_path / "toy").train()  # fmt: skip


def test_rates_are_those_searched_on_the_model_nearest_in_width(tmp_path: Path) -> None:
    def rate(method: Any, width: int) -> Any:
        made = ContinualTrainer(decoder(width=width), tasks("colour"), method, arguments(tmp_path))
        return made.method.options()["lr"]

    for method in ("eblora", "sequential_merge"):
        for width in (32, 640):
            assert rate(method, width) == searched_rates(width, method)["lr"]
        assert rate(method, 640) != rate(method, 32)
    assert rate({"name": "eblora", "lr": 1e-3}, 576) == 1e-3
    assert rate({"name": "eblora", "step": "spectral"}, 576) == make_method("eblora", step="spectral").options()["lr"]


def test_another_run_other_weights_and_wrong_arguments_are_refused(finished: ContinualTrainer, tmp_path: Path) -> None:
    def again(**options: Any) -> ContinualTrainer:
        return trainer(finished.folder, args=arguments(finished.folder, **TWO_EPOCHS), **options)

    with pytest.raises(ValueError, match="holds a run already"):
        again().train()
    with pytest.raises(ValueError, match=r"method: 'eblora' there, 'balanced' here"):
        again(method="balanced").train(resume=True)
    with pytest.raises(ValueError, match="other weights"):
        again(model=lambda: decoder(seed=1)).train(resume=True)
    with pytest.raises(TypeError, match=r"argument of Trainer 'calbacks'.*callbacks"):
        again(calbacks=[])
    with pytest.raises(TypeError, match="train_dataset is given by the run"):
        again(train_dataset=[])
    with pytest.raises(ValueError, match=r"merge is 'merge' or 'keep', got 'both'"):
        again(merge="both")
    with pytest.raises(ValueError, match="no folder"):
        ContinualTrainer(decoder(), tasks(), "eblora")


@pytest.mark.slow
def test_checkpoints_of_a_run_without_record_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "tasks/01-colour/checkpoints/checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "losses.json").write_text(json.dumps({"format": "manifold_cl.losses", "version": 1, "losses": [1, 2]}))
    assert len(trainer(tmp_path, "sequential_merge").train().losses[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_a_statistic_of_the_last_steps_is_whole_after_an_interruption(step: int, tmp_path: Path) -> None:
    """No checkpoint is written once the method collects, so that it starts again before its first step."""
    method = {"name": "eblora", "rank": 4, "lr": 0.03, "energy": 0.9, "statistics_during": 0.5}

    def made(folder: Path) -> ContinualTrainer:
        return trainer(folder, method, args=arguments(folder, **{**TWO_EPOCHS, "save_steps": 1}))

    expected = made(tmp_path / "run").train()
    killed = made(tmp_path / "killed")
    killed.on_progress(killer(1, "train", step))
    with pytest.raises(KilledError):
        killed.train()
    kept = [p.name for p in (tmp_path / "killed/tasks/02-number/checkpoints").glob("*")]
    assert max(kept) == "checkpoint-3"
    record = made(tmp_path / "killed").train(resume=True)
    assert record.losses == expected.losses
    assert record.accuracy == expected.accuracy
    first, second = (SubspaceMemory.load(tmp_path / run / "tasks/02-number") for run in ("run", "killed"))
    assert all(torch.equal(first[name].basis, second[name].basis) for name in first)
