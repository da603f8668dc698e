"""NaN and infinity at every stage of learning a task: an error before anything is written, never a poisoned result."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_jobs import METHODS, run_state
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from toy import ToyTask, toy_stream

from manifold_cl import ContinualRunner, RunRecord
from manifold_cl.adapters import adapters_of
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.runner import Progress

POISONED, STEPS = "second", 6
"""The task whose learning is poisoned, and its number of steps."""
Poison = Callable[[pytest.MonkeyPatch, ContinualRunner, float, int], None]


def at_call(number: int) -> Callable[[], bool]:
    """A function that is True at its call of that number."""
    count = iter(range(1, 10**9))
    return lambda: next(count) == number


def poison_input(patch: pytest.MonkeyPatch, runner: ContinualRunner, value: float, step: int) -> None:
    original, due = ToyTask.batches, at_call(step)

    def batches(self: ToyTask, split: Any, **options: Any) -> Any:
        for x, y in original(self, split, **options):
            yield (x.clone().fill_(value), y) if split == "train" and self.name == POISONED and due() else (x, y)

    patch.setattr(ToyTask, "batches", batches)


def poison_loss(patch: pytest.MonkeyPatch, runner: ContinualRunner, value: float, step: int) -> None:
    original, due = ToyTask.loss, at_call(step)

    def loss(self: ToyTask, model: nn.Module, batch: Any) -> Tensor:
        found = original(self, model, batch)
        return found * value if self.name == POISONED and due() else found

    patch.setattr(ToyTask, "loss", loss)


def in_training(runner: ContinualRunner) -> Callable[[], bool]:
    """Whether the poisoned task trains now."""
    now: list[Progress] = []
    runner.on_progress = now.append
    return lambda: bool(now) and (now[-1].index, now[-1].phase) in ((1, "train"), (1, "prepare"), (1, "statistics"))


def poison_step(register: Any, spoil: Callable[[torch.optim.Optimizer, float], None]) -> Poison:
    def poison(patch: pytest.MonkeyPatch, runner: ContinualRunner, value: float, step: int) -> None:
        due, training = at_call(step), in_training(runner)

        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if training() and due():
                spoil(optimizer, value)

        handle = register(hook)
        patch.setattr(runner, "poison", handle, raising=False)

    return poison


def trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def spoil_gradient(optimizer: torch.optim.Optimizer, value: float) -> None:
    trained(optimizer)[-1].grad.view(-1)[0] = value  # type: ignore[union-attr]


@torch.no_grad()
def spoil_parameter(optimizer: torch.optim.Optimizer, value: float) -> None:
    trained(optimizer)[-1].view(-1)[0] = value


def spoil_state(optimizer: torch.optim.Optimizer, value: float) -> None:
    for state in optimizer.state.values():
        for entry in state.values():
            if isinstance(entry, Tensor) and entry.ndim:
                entry.view(-1)[0] = value


def poison_model(phase: str, spoil: Callable[[nn.Module, float], None]) -> Poison:
    """Poisons the model when a phase of the task begins."""

    def poison(patch: pytest.MonkeyPatch, runner: ContinualRunner, value: float, step: int) -> None:
        models: list[nn.Module] = []
        original = runner._pretrained_model

        def make() -> nn.Module:
            models.append(original())
            return models[-1]

        def on_progress(progress: Progress) -> None:
            if (progress.index, progress.phase, progress.step) == (1, phase, 0):
                spoil(models[-1], value)

        patch.setattr(runner, "_pretrained_model", make)
        runner.on_progress = on_progress

    return poison


@torch.no_grad()
def spoil_base(model: nn.Module, value: float) -> None:
    layer: Any = model.get_submodule("outer")
    getattr(layer, "base", layer).weight.view(-1)[3] = value


@torch.no_grad()
def spoil_factor(model: nn.Module, value: float) -> None:
    for adapter in adapters_of(model).values():
        next(p for p in adapter.parameters() if p.requires_grad).view(-1)[0] = value


POISONS: dict[str, Poison] = {
    "input": poison_input,
    "loss": poison_loss,
    "gradient": poison_step(register_optimizer_step_pre_hook, spoil_gradient),
    "parameter": poison_step(register_optimizer_step_post_hook, spoil_parameter),
    "optimizer state": poison_step(register_optimizer_step_post_hook, spoil_state),
    "base weight before training": poison_model("prepare", spoil_base),
    "base weight after training": poison_model("finish", spoil_base),
    "factor after training": poison_model("finish", spoil_factor),
}
NAMES = ("NaN", "nan", "inf", "finite")
"""Words of which every message has one."""


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}

    def of(method: str) -> dict[str, Any]:
        if method not in known:
            folder = tmp_path_factory.mktemp("clean")
            make(folder, method).run()
            known[method] = dict(run_state(folder))
        return known[method]

    return of


def make(folder: Path, method: str) -> ContinualRunner:
    return ContinualRunner(toy_stream(), make_method(method, **METHODS[method]), folder, training=Training(epochs=1))


@pytest.mark.reliability
@pytest.mark.parametrize(("value", "step"), [(math.nan, STEPS - 1), (math.inf, 1)])
@pytest.mark.parametrize("stage", POISONS)
@pytest.mark.parametrize("method", ["eblora", "sequential_merge", "gpm", "ewc_lora"])
def test_a_value_that_is_not_finite_ends_the_task_before_a_file_is_written(
    method: str, stage: str, value: float, step: int, clean: Any, tmp_path: Path, tally: Callable[..., None]
) -> None:
    if stage == "factor after training" and method == "gpm":
        pytest.skip("gpm trains the weights themselves")
    with pytest.MonkeyPatch.context() as patch:
        runner = make(tmp_path, method)
        POISONS[stage](patch, runner, value, step)
        try:
            with pytest.raises((FloatingPointError, ValueError)) as caught:
                runner.run()
        finally:
            if handle := getattr(runner, "poison", None):
                handle.remove()
    assert any(word in str(caught.value) for word in NAMES)
    assert RunRecord.load(tmp_path).done == 1
    assert not list((tmp_path / "tasks" / "02-second").glob("*"))
    tally("poisoned values", f"{stage}, {method}")
    make(tmp_path, method).run(resume=True)
    assert run_state(tmp_path) == clean(method)
