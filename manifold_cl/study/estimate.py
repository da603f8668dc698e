"""Estimated time of a study, from complete cells and from a few measured steps of the other methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import mean, median

import torch
from torch import nn

from manifold_cl.continual import Method, RunRecord, TaskStream, Training
from manifold_cl.continual.stage import Stage, derive_seed
from manifold_cl.study.plan import Cell, StudyPlan

STEPS = 4
"""Training steps that are timed, after one for warming up."""


@dataclass(frozen=True)
class Estimate:
    """Seconds per cell of a method, and the source of the number."""

    label: str
    seconds: float
    source: str


def estimate(
    plan: StudyPlan,
    records: Mapping[Cell, RunRecord],
    *,
    on_label: Callable[[str], None] = lambda label: None,
) -> list[Estimate]:
    """An estimate for each method that has cells to run.

    A method with complete cells gets their median. For another one, the first and the last task are started, trained
    for a few steps and ended, and all tasks are scored once; the numbers of steps and evaluations scale this to a cell.

    Args:
        plan: the study.
        records: of its cells so far.
        on_label: called with each label before it is measured.
    """
    done: dict[str, list[float]] = {}
    for cell, record in records.items():
        if record.status == "complete":
            done.setdefault(cell.label, []).append(record.seconds)
    wanted = dict.fromkeys(
        cell.label for cell in plan.cells if cell not in records or records[cell].status != "complete"
    )
    stream, scoring, found = None, 0.0, []
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        for label in wanted:
            if label in done:
                found.append(Estimate(label, median(done[label]), f"median of {len(done[label])} done"))
                continue
            on_label(label)
            if stream is None:
                stream = plan.open_stream(next(iter(plan.orders)))
                pretrained = stream.make_model()
                scoring = _scoring_seconds(pretrained, stream, plan)
            method, training = plan.make_method(label), plan.make_training(plan.seeds[0])
            found.append(
                Estimate(
                    label, scoring + _learning_seconds(method, pretrained, stream, training, plan.device), "measured"
                )
            )
    finally:
        torch.set_num_threads(before)
    return found


def _scoring_seconds(pretrained: nn.Module, stream: TaskStream, plan: StudyPlan) -> float:
    """Seconds of all evaluations of a run: every task before the first and after each."""
    model = pretrained.to(plan.device)
    split = plan.make_training(0).evaluate_on
    start = time.perf_counter()
    for task in stream.tasks:
        task.scores(model, split)
    return (time.perf_counter() - start) * (len(stream.tasks) + 1)


def _learning_seconds(
    method: Method, pretrained: nn.Module, stream: TaskStream, training: Training, device: str
) -> float:
    """Seconds of learning all tasks, from a few steps of the first and the last."""
    if not method.trains:
        return 0.0
    indices = sorted({0, len(stream.tasks) - 1})
    parts = [_task_seconds(method, pretrained, stream, index, training, device) for index in indices]
    steps = [task.batch_count("train", training.batch_size) for task in stream.tasks]
    epochs = [training.epochs_of(index) for index in range(len(steps))]
    around, each = mean(part[0] for part in parts), mean(part[1] for part in parts)
    return around * len(steps) + each * sum(n * times for n, times in zip(steps, epochs, strict=True))


def _task_seconds(
    method: Method, pretrained: nn.Module, stream: TaskStream, index: int, training: Training, device: str
) -> tuple[float, float]:
    """Seconds around the training of one task, and of one step in it."""
    model = deepcopy(pretrained).to(device)
    task = stream.tasks[index]
    stage = Stage(task, 0, stream.targets, training.seed, training.batch_size, stream.tasks)
    order = torch.Generator().manual_seed(derive_seed(training.seed, "estimate"))
    batches = task.batches("train", batch_size=training.batch_size, generator=order)
    clock = [time.perf_counter()]
    method.begin_task(model, stage)
    optimizer = method.make_optimizer(model)
    clock.append(time.perf_counter())
    for batch in islice(batches, STEPS + 1):
        optimizer.zero_grad()
        method.loss(model, task, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clock.append(time.perf_counter())
    method.finish_task(model, stage)
    method.end_task(model, stage)
    ended = time.perf_counter()
    return (clock[1] - clock[0]) + (ended - clock[-1]), median(_gaps(clock[2:]))


def _gaps(moments: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(moments)] or [0.0]
