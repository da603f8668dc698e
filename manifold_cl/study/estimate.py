"""Estimated time of a study, from complete cells and from a few measured steps of the other methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import mean, median

import torch

from manifold_cl.continual import Method, RunRecord
from manifold_cl.continual.stage import Stage, derive_seed
from manifold_cl.study.plan import Cell, StudyPlan

STEPS = 4
"""Training steps that are timed, after one for warming up."""


@dataclass(frozen=True)
class Estimate:
    """Seconds per cell of a method, with the source of the number."""

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

    For a method with complete cells, their median. For another one, a few training steps of the first and the last
    task and one evaluation of all tasks, scaled by the numbers of steps and evaluations in a cell.

    Args:
        plan: the study.
        records: of its cells so far.
        on_label: called with each label before it is measured.
    """
    done = {
        cell: records[cell].seconds for cell in plan.cells if cell in records and records[cell].status == "complete"
    }
    estimates, probe = [], None
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        for label in dict.fromkeys(cell.label for cell in plan.cells if cell not in done):
            if seconds := [done[cell] for cell in done if cell.label == label]:
                estimates.append(Estimate(label, median(seconds), f"median of {len(seconds)} done"))
                continue
            on_label(label)
            probe = probe or _Probe(plan)
            estimates.append(Estimate(label, probe.seconds(label), "measured"))
    finally:
        torch.set_num_threads(before)
    return estimates


class _Probe:
    """Times methods on the stream of a plan."""

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.training = plan.make_training(plan.seeds[0])
        self.stream = plan.open_stream(next(iter(plan.orders)))
        self.pretrained = self.stream.make_model().to(plan.device)
        start = time.perf_counter()
        for task in self.stream.tasks:
            task.scores(self.pretrained, self.training.evaluate_on)
        self.scoring = (time.perf_counter() - start) * (len(self.stream.tasks) + 1)  # before the first task, after each

    def seconds(self, label: str) -> float:
        """Seconds of a cell, from all evaluations and a few steps of the first and the last task."""
        method, tasks = self.plan.make_method(label), self.stream.tasks
        if not method.trains:
            return self.scoring
        times = [self._task_seconds(method, index) for index in sorted({0, len(tasks) - 1})]
        around, each = mean(time[0] for time in times), mean(time[1] for time in times)
        steps = (
            task.batch_count("train", self.training.batch_size) * self.training.epochs_of(index)
            for index, task in enumerate(tasks)
        )
        return self.scoring + around * len(tasks) + each * sum(steps)

    def _task_seconds(self, method: Method, index: int) -> tuple[float, float]:
        """Seconds around the training of one task, and of one step in it."""
        model, task, training = deepcopy(self.pretrained), self.stream.tasks[index], self.training
        stage = Stage(task, 0, self.stream.targets, training.seed, training.batch_size, self.stream.tasks)
        order = torch.Generator().manual_seed(derive_seed(training.seed, "estimate"))
        clock = [time.perf_counter()]
        method.begin_task(model, stage)
        optimizer = method.make_optimizer(model)
        clock.append(time.perf_counter())
        for batch in islice(task.batches("train", batch_size=training.batch_size, generator=order), STEPS + 1):
            optimizer.zero_grad()
            method.loss(model, task, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            clock.append(time.perf_counter())
        method.finish_task(model, stage)
        method.end_task(model, stage)
        around = (clock[1] - clock[0]) + (time.perf_counter() - clock[-1])
        return around, median([after - before for before, after in pairwise(clock[2:])] or [0.0])
