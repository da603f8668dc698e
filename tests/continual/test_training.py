"""Training of a task: epochs and rates per task, accumulation, clipping, additional parameters."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy import ToyModel, toy_stream

from manifold_cl import ContinualRunner, RiemannianAdamW, Task, TaskStream
from manifold_cl.adapters import adapters_of
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.continual.losses import nonfinite_remedy
from manifold_cl.continual.method import Stage
from manifold_cl.files import FileError
from manifold_cl.tensor_files import write_tensors

SMALL = {"rank": 4, "alpha": 8.0, "lr": 0.03}


def run(folder: Path, training: Training, method: str = "sequential_merge", **options: float) -> ContinualRunner:
    made = ContinualRunner(toy_stream(), make_method(method, **{**SMALL, **options}), folder, training=training)
    made.run()
    return made


def losses(folder: Path, training: Training) -> list[list[float]]:
    method = make_method("sequential_merge", **SMALL)
    return ContinualRunner(toy_stream(), method, folder, training=training).run().losses


def test_epochs_may_differ_between_tasks(tmp_path: Path) -> None:
    found = losses(tmp_path, Training(epochs=(2, 1, 3), batch_size=48))
    assert [len(each) for each in found] == [4, 2, 6]


def test_accumulated_batches_are_one_step_of_their_mean(tmp_path: Path) -> None:
    whole = losses(tmp_path / "whole", Training(batch_size=48))
    parts = losses(tmp_path / "parts", Training(batch_size=16, accumulation=3))
    assert [len(each) for each in parts] == [2, 2, 2]
    np.testing.assert_allclose(parts, whole, rtol=1e-4)  # the same sums in another order, in float32


def test_the_last_step_of_an_epoch_takes_what_is_left(tmp_path: Path) -> None:
    # 96 examples in batches of 16: six, of which four make a step and two the next.
    found = losses(tmp_path, Training(batch_size=16, accumulation=4))
    assert [len(each) for each in found] == [2, 2, 2]


def test_a_rate_of_zero_keeps_a_task_from_learning(tmp_path: Path) -> None:
    # One batch an epoch: the loss can only change with the model.
    first, second, third = losses(tmp_path, Training(epochs=4, batch_size=96, rates=(0.0, 1.0, 1.0)))
    assert max(first) - min(first) < 1e-6  # the batch is shuffled, so float32 sums differ in order
    assert min(second[0] - second[-1], third[0] - third[-1]) > 0.01


def test_clipping_limits_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watching(self: torch.optim.AdamW, closure: None = None) -> None:
        seen.append(float(torch.cat([p.grad.reshape(-1) for g in self.param_groups for p in g["params"]]).norm()))
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    losses(tmp_path / "free", Training(batch_size=48))
    assert max(seen) > 0.1
    seen.clear()
    losses(tmp_path / "clipped", Training(batch_size=48, clip=0.1))
    assert max(seen) <= 0.1 * (1 + 1e-5)  # float32 norm of a rescaled vector


def test_clipping_measures_what_a_point_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The normal part of a gradient, which no step follows, does not shorten the step of a frame."""
    norms: list[tuple[float, float]] = []
    step = RiemannianAdamW.step

    def watching(self: RiemannianAdamW, closure: None = None) -> None:
        euclidean = torch.cat([p.grad.reshape(-1) for g in self.param_groups for p in g["params"]]).norm()
        norms.append((float(self.riemannian_grad_norm()), float(euclidean)))
        step(self, closure)

    monkeypatch.setattr(RiemannianAdamW, "step", watching)
    method = make_method("eblora", rank=4, statistic_examples=32)
    ContinualRunner(toy_stream(), method, tmp_path, training=Training(batch_size=48, clip=0.01)).run()
    assert [riemannian for riemannian, _ in norms] == pytest.approx(
        [0.01] * len(norms), rel=1e-3
    )  # 1e-6 in the divisor
    assert max(euclidean for _, euclidean in norms) > 0.01 * (1 + 1e-3)  # the normal part, which the test is about


def test_only_what_differs_from_the_defaults_enters_the_configuration(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", Training(batch_size=48))
    assert not {"accumulation", "clip", "rates", "companions", "ranks"} & plain.config.keys()
    other = run(tmp_path / "other", Training(batch_size=48, accumulation=2, clip=1.0, rates=(1.0, 1.0, 0.5)))
    assert (other.config["accumulation"], other.config["clip"], other.config["rates"]) == (2, 1.0, [1.0, 1.0, 0.5])


def test_wrong_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epochs has 2 entries for 3 tasks: give one per task"):
        run(tmp_path, Training(epochs=(1, 2)))
    with pytest.raises(ValueError, match="epochs has 0 entries for 3 tasks"):
        run(tmp_path, Training(epochs=()))
    with pytest.raises(ValueError, match="rates has 1 entries for 3 tasks"):
        run(tmp_path, Training(rates=(1.0,)))
    with pytest.raises(ValueError, match="accumulation must be at least 1, got 0"):
        Training(accumulation=0)
    with pytest.raises(ValueError, match=r"clip is a positive number, got 0\.0"):
        Training(clip=0.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, r"epochs is a whole number, got 1\.5"),
        ({"epochs": [1, 0, 1]}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": True}, TypeError, "epochs is a whole number, got True"),
        ({"batch_size": "16"}, TypeError, "batch_size is a whole number, got '16'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"accumulation": 2.0}, TypeError, r"accumulation is a whole number, got 2\.0"),
        ({"warmup": 5.0}, ValueError, r"warmup is a share in \[0, 1\], got 5\.0"),
        ({"warmup": "0.1"}, TypeError, r"warmup is a number, got '0\.1'"),
        ({"evaluate_on": "tets"}, ValueError, "evaluate_on is one of train, validation, test, got 'tets'"),
        ({"rates": 0.5}, TypeError, r"rates is a list with one factor per task, got 0\.5"),
        ({"rates": [1.0, -1.0, 1.0]}, ValueError, r"rates is a finite number from 0 on, got -1\.0"),
        ({"clip": float("inf")}, ValueError, "clip is a finite number, got inf"),
    ],
)
def test_training_that_cannot_be_is_refused_where_it_enters(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Training(**options)  # type: ignore[arg-type]


def test_lists_of_a_file_become_tuples_and_have_an_entry_a_task() -> None:
    training = Training(epochs=[1, 2, 3], rates=[1.0, 0.5, 0.0])  # type: ignore[arg-type]
    assert (training.epochs, training.rates) == ((1, 2, 3), (1.0, 0.5, 0.0))
    training.validate_tasks(3)
    with pytest.raises(ValueError, match="rates has 1 entries for 3 tasks: give one per task"):
        Training(rates=[1.0]).validate_tasks(3)  # type: ignore[arg-type]


def test_magnitudes_may_start_by_depth_and_decay() -> None:
    stream = toy_stream()
    method = make_method("eblora", rank=4, initial_scale=-0.1, initial_scale_last=-0.3, scale_decay=0.5)
    named = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])})
    scales = method._initial_scales([name for name, m in named.named_modules() if isinstance(m, nn.Linear)])  # type: ignore[attr-defined]
    assert scales == pytest.approx({"blocks.0": -0.1, "blocks.1": -0.2, "blocks.2": -0.3})
    model = stream.make_model()
    method.begin_task(model, Stage(stream.tasks[0], 0, stream.targets, 0, 16))
    assert {round(float(a.scale.detach()), 6) for a in adapters_of(model).values()} == {-0.1}  # type: ignore[arg-type]
    groups = {group["role"]: group["weight_decay"] for group in method.make_optimizer(model).param_groups}
    assert groups == {"points": 0.0, "scales": 0.5}


def test_additional_parameters_train_at_their_own_rate_and_freeze_again() -> None:
    model = ToyModel()
    additional = AdditionalParameters(r"head\..*", lr=(0.1, 0.2), weight_decay=0.3)
    optimizer = torch.optim.AdamW([model.inner.weight], lr=1.0)
    additional.add_to(optimizer, model, 1)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups[1:]] == [(0.2, 0.3)]
    assert model.head.weight.requires_grad
    model(torch.ones(1, 24)).sum().backward()
    additional.freeze(model)
    assert not model.head.weight.requires_grad
    assert model.head.weight.grad is None
    assert additional.provenance(model) == {"pattern": r"head\..*", "parameters": 64, "names": ["head.weight"]}


def test_additional_parameters_that_cannot_be_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"'head\(' is no regular expression"):
        AdditionalParameters("head(", lr=0.1)
    with pytest.raises(ValueError, match="lr is a finite number from 0 on, got nan"):
        AdditionalParameters("head.*", lr=(0.1, math.nan))
    with pytest.raises(ValueError, match="weight_decay is a finite number from 0 on, got -1"):
        AdditionalParameters("head.*", lr=0.1, weight_decay=-1)
    with pytest.raises(ValueError, match="additional parameters have 2 rates for 3 tasks"):
        replace(toy_stream(), additional_parameters=AdditionalParameters("head.*", lr=(0.1, 0.1)))


def test_additional_parameters_come_back_from_their_file(tmp_path: Path) -> None:
    additional, model = AdditionalParameters(r"head\..*", lr=0.1), ToyModel()
    saved = model.head.weight.detach().clone()
    additional.save(model, tmp_path, task="first")
    with torch.no_grad():
        model.head.weight.zero_()
    additional.load(model, tmp_path)
    assert torch.equal(model.head.weight, saved)
    write_tensors(tmp_path / "companions.safetensors", {"head.other": saved}, {})
    with pytest.raises(FileError, match=r"companions\.safetensors does not fit the model: head\.other, head\.weight"):
        additional.load(model, tmp_path)


def test_additional_parameters_that_are_missing_or_in_half_precision_are_refused() -> None:
    model = ToyModel()
    with pytest.raises(ValueError, match=r"no parameter matches 'neck\.\*', which should train beside the adapters"):
        AdditionalParameters("neck.*", lr=0.1).find(model)
    model.head.bfloat16()
    with pytest.raises(TypeError, match=r"head\.weight is torch\.bfloat16: train it in float32"):
        AdditionalParameters("head.*", lr=0.1).find(model)


def test_a_stream_may_train_additional_parameters(tmp_path: Path) -> None:
    stream = replace(toy_stream(), additional_parameters=AdditionalParameters("head.*", lr=0.01))
    method = make_method("sequential_merge", **SMALL)
    record = ContinualRunner(stream, method, tmp_path, training=Training(batch_size=48)).run()
    assert record.provenance["companions"]["names"] == ["head.weight"]
    assert sorted(p.name for p in tmp_path.rglob("companions.safetensors")) == ["companions.safetensors"] * 3


def test_a_loss_over_nothing_is_told_from_a_rate_that_is_too_high() -> None:
    labels = torch.tensor([[5, -100], [-100, -100]])
    finite, damaged = [torch.ones(2)], [torch.ones(2), torch.tensor([1.0, math.nan])]
    batches = [{"labels": labels}, {"labels": labels[1:]}]
    assert nonfinite_remedy(math.nan, batches, finite).startswith("every label of a batch is -100")
    assert nonfinite_remedy(math.nan, [SimpleNamespace(labels=labels[1:])], finite).startswith(
        "every label of a batch is -100"
    )
    unclear = nonfinite_remedy(math.nan, [batches[0]], finite)
    assert unclear.startswith("lower the learning rate, or")
    assert "all labels -100" in unclear
    assert nonfinite_remedy(math.nan, [batches[0]], damaged) == "lower the learning rate"
    assert nonfinite_remedy(math.inf, [labels], finite) == "lower the learning rate"


def test_a_batch_whose_labels_are_all_ignored_is_named(tmp_path: Path) -> None:
    class Ignored(Task):
        """Its batches are dictionaries, as data collators make them."""

        name = "ignored"

        def size(self, split: str) -> int:
            return 4

        def batches(self, split: str, *, batch_size: int, generator: Any = None) -> Any:
            yield {"inputs": torch.ones(4, 6), "labels": torch.full((4,), -100)}

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])

        def scores(self, model: nn.Module, split: str = "test") -> dict[str, float]:
            return {"accuracy": 0.0}

    stream = TaskStream("one", (Ignored(),), lambda: nn.Sequential(nn.Linear(6, 3)), targets=("0",))
    with pytest.raises(FloatingPointError, match=r"the loss of ignored became nan at step 1: every label .* is -100"):
        ContinualRunner(stream, make_method("sequential_merge", rank=2), tmp_path / "run", training=Training()).run()
