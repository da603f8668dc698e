"""Estimated time of a study, from complete cells and from a few measured steps of the other methods."""

from __future__ import annotations

import heapq
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

import torch

from manifold_cl.continual import Method, RunRecord
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.training_loop import TrainingJob, TrainingLoop
from manifold_cl.study.plan import Cell, StudyPlan

STEPS = 4
"""Training steps that are timed, after one for warming up."""


@dataclass(frozen=True)
class Costs:
    """Measured seconds of parts of a cell.

    Args:
        start: imports, the stream and the model.
        scoring: one evaluation of all tasks.
        work: label of a method → everything after the evaluation before the first task.
    """

    start: float
    scoring: float
    work: Mapping[str, float] = field(default_factory=dict)

    def estimate(self, label: str, work: float, source: str) -> Estimate:
        """The estimate of a cell whose tasks take ``work`` seconds."""
        return Estimate(label, self.start + self.scoring + work, source, self.start, self.scoring)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a cell of a method, with the source of the number.

    Args:
        label: of the method.
        seconds: of a complete cell.
        source: of the number, in words.
        start: the part for imports, the stream and the model.
        scoring: the part for the evaluation before the first task.
    """

    label: str
    seconds: float
    source: str
    start: float = 0.0
    scoring: float = 0.0

    @property
    def work(self) -> float:
        """Seconds of all tasks."""
        return self.seconds - self.start - self.scoring

    def seconds_left(self, record: RunRecord | None) -> float:
        """Of a cell with this record so far: a resumed cell repeats its start, and no finished task."""
        if record is None:
            return self.seconds
        return (
            self.start + (0 if record.zero_shot else self.scoring) + self.work * (1 - record.done / len(record.tasks))
        )


Measure = Callable[[StudyPlan, Sequence[str], Callable[[str], None]], Costs]


def measure_costs(plan: StudyPlan, labels: Sequence[str], on_label: Callable[[str], None]) -> Costs:
    """The costs of a cell of each method in ``labels``, measured in this process.

    A few training steps of the first and the last task and one evaluation of all tasks, scaled by the numbers of steps
    and evaluations in a cell.

    Args:
        plan: the study.
        labels: of the methods to measure; may be empty.
        on_label: called with each label before it is measured.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        probe = _Probe(plan)
        work = {}
        for label in labels:
            on_label(label)
            work[label] = probe.seconds(label)
        return Costs(probe.start, probe.scoring, work)
    finally:
        torch.set_num_threads(before)


def estimate(
    plan: StudyPlan,
    records: Mapping[Cell, RunRecord],
    *,
    measure: Measure = measure_costs,
    on_label: Callable[[str], None] = lambda label: None,
) -> list[Estimate]:
    """An estimate for each method that has cells to run.

    For a method with complete cells, their median; for another one, `measure_costs`.

    Args:
        plan: the study.
        records: of its cells so far.
        measure: `measure_costs`, or the same on another machine (`Engine.measure`).
        on_label: called with each label before it is measured.
    """
    done = {
        cell: records[cell].seconds for cell in plan.cells if cell in records and records[cell].status == "complete"
    }
    labels = list(dict.fromkeys(cell.label for cell in plan.cells if cell not in done))
    if not labels:
        return []
    known = {label: [done[cell] for cell in done if cell.label == label] for label in labels}
    costs = measure(plan, [label for label in labels if not known[label]], on_label)
    return [
        costs.estimate(label, median(seconds), f"median of {len(seconds)} done")
        if (seconds := known[label])
        else costs.estimate(label, costs.work[label], "measured")
        for label in labels
    ]


def time_left(
    cells: Sequence[Cell], records: Mapping[Cell, RunRecord], estimates: Sequence[Estimate], slots: int
) -> float:
    """Seconds until the last of the cells is done, each started in turn as soon as one of the ``slots`` is free.

    >>> cells = [Cell("eblora", "default", seed) for seed in range(3)]
    >>> time_left(cells, {}, [Estimate("eblora", 60.0, "measured")], slots=2)
    120.0
    """
    by_label = {each.label: each for each in estimates}
    ends = [0.0] * max(1, slots)
    for cell in cells:
        heapq.heappush(ends, heapq.heappop(ends) + by_label[cell.label].seconds_left(records.get(cell)))
    return max(ends)


class _Enough(Exception):  # noqa: N818 (no error: it ends a loop of training after the steps that are timed)
    pass


class _Probe:
    """Times methods on the stream of a plan."""

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.training = plan.make_training(plan.seeds[0])
        clock = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import manifold_cl.study.worker"], check=True)
        self.stream = plan.open_anew(next(iter(plan.orders)))
        self.pretrained = self.stream.make_model().to(plan.device).requires_grad_(False)
        self._synchronize()
        self.start = time.perf_counter() - clock
        clock = time.perf_counter()
        for task in (*self.stream.tasks, *self.stream.general):
            task.scores(self.pretrained, self.training.evaluate_on)
        self.scoring = time.perf_counter() - clock

    def seconds(self, label: str) -> float:
        """Seconds of a cell after its first evaluation, from evaluations and a few steps of two tasks."""
        method, tasks = self.plan.make_method(label), self.stream.tasks
        scoring = self.scoring * len(tasks)
        stages = [self._trained(method, index) for index in range(len(tasks))] if method.trains else []
        trained = [stage for stage in stages if stage is not None]
        if not trained:
            return scoring
        times = [self._task_seconds(method, stage) for stage in dict.fromkeys((trained[0].index, trained[-1].index))]
        around, each = mean(time[0] for time in times), mean(time[1] for time in times)
        return scoring + around * len(trained) + each * sum(map(self._steps, trained))

    def _trained(self, method: Method, index: int) -> Stage | None:
        """The stage at which the method learns a task; None where it learns nothing."""
        training, tasks = self.training, self.stream.tasks
        stage = Stage(tasks[index], index, self.stream.targets, training.seed, training.batch_size, tasks)
        task = method.training_task(stage)
        return None if task is None else Stage(task, index, stage.targets, stage.seed, stage.batch_size, tasks)

    def _steps(self, stage: Stage) -> int:
        batches = stage.task.batch_count("train", self.training.batch_size)
        return self.training.epochs_of(stage.index) * math.ceil(batches / self.training.accumulation)

    def _task_seconds(self, method: Method, index: int) -> tuple[float, float]:
        """Seconds around the training of one task, and of one step in it."""
        stage = self._trained(method, index)
        assert stage is not None
        model, clock = deepcopy(self.pretrained), [time.perf_counter()]

        def on_step(step: int, steps: int, loss: float) -> None:
            clock.append(self._now())
            if step > STEPS:
                raise _Enough

        method.begin_task(model, stage)
        clock.append(self._now())
        with suppress(_Enough):
            TrainingLoop().train(model, TrainingJob(method, stage, self.training, on_step=on_step))
        end = self._now()
        method.finish_task(model, stage)
        method.end_task(model, stage)
        around = (clock[1] - clock[0]) + (self._now() - end)
        # the first step warms up, unless it is the only one
        times = [after - before for before, after in pairwise(clock[2:] if len(clock) > 3 else clock[1:])]
        return around, median(times or [0.0])

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _synchronize(self) -> None:
        """Wait for the GPU, which computes while Python goes on."""
        if torch.device(self.plan.device).type == "cuda":
            torch.cuda.synchronize(self.plan.device)
