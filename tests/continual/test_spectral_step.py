"""The spectral step of methods with frames: its directions, its rate, and what it keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_runs import LOW_RANK, stage
from toy import frozen_model, toy_stream

from manifold_cl import ContinualRunner, EBLoRALinear, adapters_of
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.methods.gpm import reach
from manifold_cl.optim import RiemannianAdamW, RiemannianMuon
from manifold_cl.optim.own_bases import DIRECTIONS

SPECTRAL: dict[str, Any] = {**LOW_RANK, "step": "spectral", "lr": 0.1, "scale_lr": 0.1, "statistic_examples": 96}
directions = pytest.mark.parametrize("direction", DIRECTIONS)


def run_of(folder: Path, direction: str) -> ContinualRunner:
    stream = toy_stream(tasks=["first", "second"])
    method = make_method("eblora", energy=0.9, direction=direction, **SPECTRAL)
    return ContinualRunner(stream, method, folder, training=Training(epochs=3))


@directions
def test_a_run_learns_and_keeps_constraints_balance_and_memory(direction: str, tmp_path: Path) -> None:
    record = run_of(tmp_path, direction).run()
    assert record.metrics["mft"] > sum(record.zero_shot["accuracy"]) / 2 + 20  # 25 % by chance; each passes 70
    assert max(value for residuals in record.constraints for value in residuals.values()) <= 2e-6
    assert run_of(tmp_path, direction).run(resume=True).metrics == record.metrics


@directions
def test_a_second_task_avoids_the_memory(direction: str) -> None:
    method, model = make_method("eblora", energy=0.9, direction=direction, **SPECTRAL), frozen_model()
    for index in range(2):
        method.begin_task(model, stage(index))
        optimizer = method.make_optimizer(model)
        assert type(optimizer) is RiemannianMuon
        points, scales = optimizer.param_groups
        assert (points["direction"], points["momentum"], points["lr"]) == (direction, 0.95, 0.1)
        assert (scales["role"], scales["lr"], scales["weight_decay"]) == ("scales", 0.1, 0.0)
        for batch in stage(index).task.batches("train", batch_size=16):
            optimizer.zero_grad()
            method.loss(model, stage(index).task, batch).backward()
            optimizer.step()
        if index == 0:
            method.end_task(model, stage())
    for layer, adapter in adapters_of(model).items():
        update = adapter.factors().delta_weight()
        sigma = torch.linalg.svdvals(update)[:4]
        assert float(sigma.max() / sigma.min()) == pytest.approx(1, abs=1e-5)  # float32
        assert method.memory[layer].k > 0
        assert reach(update, method.memory[layer]) < 1e-6  # float32


@pytest.mark.parametrize("lr", [0.02, 0.2])
def test_the_rate_is_the_spectral_length_of_a_step(lr: float) -> None:
    method, model = make_method("eblora", **{**SPECTRAL, "lr": lr}), frozen_model()
    method.begin_task(model, stage())
    frames = {name: adapter.left.detach().clone() for name, adapter in adapters_of(model).items()}
    optimizer = method.make_optimizer(model)
    method.loss(model, stage().task, next(stage().task.batches("train", batch_size=96))).backward()
    optimizer.step()
    for name, adapter in adapters_of(model).items():
        turned = torch.linalg.svdvals(frames[name].mT @ adapter.left.detach()).clamp(max=1).acos()
        moved = float(torch.linalg.matrix_norm(adapter.left.detach() - frames[name], 2))
        assert 0.9 * lr < moved <= lr * (1 + 1e-4)  # a chord of an angle of at most lr radians
        assert float(turned.max()) <= lr * (1 + 1e-4)


@pytest.mark.parametrize("name", ["eblora", "balanced", "restricted"])
def test_the_searched_rate_of_one_step_is_never_used_for_another(name: str) -> None:
    method = make_method(name)
    assert (method.options()["step"], method.options()["direction"]) == ("corrected", None)
    assert method.lr == method.searched["corrected"]
    for direction in DIRECTIONS:
        if direction in method.searched:
            chosen = make_method(name, step="spectral", direction=direction)
            assert chosen.lr == method.searched[direction]
            assert chosen.options()["lr"] == chosen.lr  # a record shows the rate that was used
        else:
            message = f"{name}: lr is missing: no rate was searched for step='spectral', direction='{direction}'"
            with pytest.raises(ValueError, match=message):
                make_method(name, step="spectral", direction=direction)
    given = make_method(name, step="spectral", lr=0.07)
    assert (given.lr, given.options()["direction"]) == (0.07, "exact")


def test_a_direction_belongs_to_the_spectral_step() -> None:
    for step in ("corrected", "official"):
        with pytest.raises(ValueError, match=rf"direction='spel' is an option of step='spectral', .* is '{step}'"):
            make_method("eblora", step=step, direction="spel")
    with pytest.raises(ValueError, match="direction is one of exact, spel, projected, intrinsic, got 'steepest'"):
        make_method("eblora", step="spectral", direction="steepest", lr=0.1)
    with pytest.raises(ValueError, match="unknown option of stella_merge 'direction'"):
        make_method("stella_merge", direction="exact")


def test_ablations_take_the_spectral_step_on_their_frames() -> None:
    """The full core of `restricted` steps as in AdamW, as a magnitude does."""
    method, model = make_method("restricted", energy=0.9, **SPECTRAL), frozen_model()
    method.begin_task(model, stage())
    optimizer = method.make_optimizer(model)
    cores = {name: adapter.scale.detach().clone() for name, adapter in adapters_of(model).items()}
    method.loss(model, stage().task, next(stage().task.batches("train", batch_size=96))).backward()
    optimizer.step()
    for name, adapter in adapters_of(model).items():
        assert isinstance(adapter, EBLoRALinear)
        step = (adapter.scale.detach() - cores[name]).abs()
        torch.testing.assert_close(step, torch.full_like(step, 0.1), rtol=1e-3, atol=0)  # Adam's first step is lr
    balanced = make_method("balanced", **SPECTRAL)
    balanced.begin_task(model := frozen_model(), stage())
    assert type(balanced.make_optimizer(model)) is RiemannianMuon
    other = make_method("balanced")
    assert isinstance(other.make_optimizer(model), RiemannianAdamW)
