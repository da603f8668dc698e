"""Options of every baseline for the toy stream, and runs of them."""

from pathlib import Path
from typing import Any

import pytest
from toy import ToyModel, frozen_model, toy_stream

from manifold_cl import ContinualRunner
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.method import Stage

LOW_RANK = {"rank": 4, "alpha": 8.0}


OPTIONS: dict[str, dict[str, Any]] = {
    "balanced": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "statistic_examples": 96},
    "best": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistics_during": 0.25},
    "e2lora": {**LOW_RANK, "lr": 0.1, "budget": 10, "statistic_examples": 96},
    "ella": {**LOW_RANK, "lr": 0.03, "strength": 0.01},
    "ewc_lora": {**LOW_RANK, "lr": 0.03, "strength": 0.01, "statistic_examples": 32},
    "factorial": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "update_norm": 1.0, "statistic_examples": 96},
    "gpm": {"lr": 0.02, "statistic_examples": 96, "energy": 0.9},
    "inflora": {**LOW_RANK, "lr": 0.1, "energy": 0.8, "last_energy": 0.9, "statistic_examples": 96},
    "joint": {**LOW_RANK, "lr": 0.03},
    "keeplora": {**LOW_RANK, "lr": 0.1, "energy": 0.9, "from_weights": 0.5, "statistic_examples": 96},
    "lora_muon": {**LOW_RANK, "lr": 0.1},
    "lora_muon_ogd": {**LOW_RANK, "lr": 0.1, "energy": 0.9, "statistic_examples": 96},
    "olora": {**LOW_RANK, "lr": 0.03, "orthogonality": 0.5},
    "osft_lora": {**LOW_RANK, "lr": 0.03},
    "restricted": {**LOW_RANK, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistic_examples": 96},
    "sequential": {**LOW_RANK, "lr": 0.03},
    "slao": {**LOW_RANK, "lr": 0.03},
    "splitlora": {**LOW_RANK, "lr": 0.1, "trade_off": 2.0, "statistic_examples": 96},
    "stella_merge": {**LOW_RANK, "lr": 0.03, "initial_scale": 0.1},
    "svd_eq": {**LOW_RANK, "lr": 0.03},
}


def run_of(folder: Path, name: str, *, stop_after: int | None = None, **options: Any) -> ContinualRunner:
    class StopHereError(Exception):
        pass

    def watch(progress: Any) -> None:
        if stop_after is not None and progress.index == stop_after and progress.phase == "train" and progress.step == 2:
            raise StopHereError

    runner = ContinualRunner(
        toy_stream(), make_method(name, **{**OPTIONS[name], **options}), folder, training=Training(epochs=3),
        on_progress=watch,
    )  # fmt: skip
    if stop_after is not None:
        with pytest.raises(StopHereError):
            runner.run()
    return runner


def stage(index: int = 0) -> Stage:
    stream = toy_stream()
    return Stage(stream.tasks[index], index, ("inner", "outer"), 0, 16, stream.tasks)


def trained(name: str, tasks: int = 2, **options: Any) -> tuple[Any, ToyModel]:
    """A method in the middle of its last task: adapters trained, nothing folded in."""
    method, model = make_method(name, **{**OPTIONS[name], **options}), frozen_model()
    for index in range(tasks):
        at = stage(index)
        method.begin_task(model, at)
        optimizer = method.make_optimizer(model)
        for batch in at.task.batches("train", batch_size=16, generator=at.generator("order 0")):
            optimizer.zero_grad()
            method.loss(model, at.task, batch).backward()
            optimizer.step()
        method.finish_task(model, at)
        if index < tasks - 1:
            method.end_task(model, at)
    return method, model
