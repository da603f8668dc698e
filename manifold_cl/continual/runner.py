"""The loop over tasks: learn, fold in, evaluate, write down; killed at any moment, it goes on from the last task."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from manifold_cl.adapters import adapters_of
from manifold_cl.adapters.files import FileError
from manifold_cl.continual.method import Method, Stage
from manifold_cl.continual.record import RunRecord, differences, library_versions, machine, now
from manifold_cl.continual.task import Split, TaskStream
from manifold_cl.optim.riemannian import OnManifolds

logger = logging.getLogger("manifold_cl")


@dataclass(frozen=True)
class Training:
    """How every task is trained, the same for all methods.

    Args:
        epochs: passes over a task's training split.
        batch_size: examples a step.
        warmup: share of the steps over which the learning rate rises linearly; then it falls as a cosine to 0.
        seed: of everything random in the run; data selection has its own, fixed one.
        evaluate_on: the split that scores come from; ``"validation"`` while tuning.
    """

    epochs: int = 1
    batch_size: int = 16
    warmup: float = 0.1
    seed: int = 0
    evaluate_on: Split = "test"


@dataclass(frozen=True)
class Progress:
    """Where a run is: what a progress display needs."""

    task: str
    index: int
    tasks: int
    phase: str
    step: int = 0
    steps: int = 0
    loss: float = math.nan


class ContinualRunner:
    """Runs one method over one stream into one folder.

    Args:
        stream: tasks and pre-trained model.
        method: how to learn; a fresh instance, since methods have state.
        folder: where the record, adapters and memory go.
        training: what is equal for all methods.
        device: where the model runs.
        details: further entries of the configuration, such as how the stream was cut down.
        on_progress: called at every step and phase.
    """

    def __init__(
        self,
        stream: TaskStream,
        method: Method,
        folder: Path | str,
        *,
        training: Training | None = None,
        device: torch.device | str = "cpu",
        details: Mapping[str, Any] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.stream = stream
        self.method = method
        self.folder = Path(folder)
        self.training = training or Training()
        self.device = torch.device(device)
        config = {
            "method": method.name,
            "stream": stream.name,
            "tasks": list(stream.task_names),
            "device": str(self.device),
            **asdict(self.training),
            **method.options(),
            **(details or {}),
        }
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # as it will be read: tuples become lists
        self.on_progress = on_progress

    def check(self, *, resume: bool = False) -> None:
        """Raise what `run` would raise about the folder, before anything is spent."""
        self._opened(resume)

    def run(self, *, resume: bool = False) -> RunRecord:
        """Run all tasks that are not in the folder yet, and return the complete record.

        Args:
            resume: go on from what the folder holds; needs the same configuration. On the CPU the numbers are
                bit for bit those of a run that was never interrupted.

        Raises:
            FileError: when the folder holds a run and ``resume`` is off, or one of another configuration (the
                differences are listed), or a damaged one. Nothing is overwritten.
        """
        record = self._opened(resume)
        if record.status == "complete":
            return record
        model = self.stream.make_model().to(self.device)
        self.method.check(model, self.stream.targets)
        if not record.zero_shot:
            record.zero_shot = self._zero_shot(model)
            record.primary = next(iter(record.zero_shot))
            record.save(self.folder)
        self.method.restore(model, [self._task_folder(i) for i in range(record.done)])
        for index in range(record.done, len(self.stream.tasks)):
            self._learn(model, index, record)
        record.status, record.finished = "complete", now()
        record.save(self.folder)
        return record

    def _opened(self, resume: bool) -> RunRecord:
        path = self.folder / "record.json"
        if path.exists():
            found = RunRecord.load(self.folder)
            if differing := differences(found.config, self.config):
                raise FileError(f"{self.folder} holds a run of another configuration: {'; '.join(differing)}")
            if not resume:
                raise FileError(
                    f"{self.folder} holds a run already ({found.status}): resume it, or choose another folder"
                )
            return found
        return RunRecord(
            name=self.folder.name,
            method=self.method.name,
            stream=self.stream.name,
            config=self.config,
            tasks=list(self.stream.task_names),
            versions=library_versions(),
            machine=machine(),
            provenance=dict(self.stream.provenance),
            started=now(),
        )

    def _tell(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)

    def _zero_shot(self, model: nn.Module) -> dict[str, list[float]]:
        rows = self._evaluated(model, self._progress(0, "zero-shot"))
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _learn(self, model: nn.Module, index: int, record: RunRecord) -> None:
        stage = self._stage(index)
        folder = self._task_folder(index)
        progress = self._progress(index, "prepare")
        clock = _Clock()
        losses: list[float] = []
        constraints: dict[str, float] = {}
        if self.method.trains:
            self._tell(progress)
            self.method.begin_task(model, stage)
            clock.lap("prepare")
            losses = self._train(model, stage, clock, replace(progress, phase="train"))
            clock.lap("train")
            clock.seconds["optimizer"] /= clock.seconds["train"]
            constraints = _constraint_errors(model)
            self._tell(replace(progress, phase="finish"))
            self.method.save_update(model, folder, stage)
            self.method.end_task(model, stage)
            self.method.save_state(folder, stage)
            clock.lap("finish")
        scores = self._evaluated(model, replace(progress, phase="evaluate"))
        clock.lap("evaluate")
        record.timings.append({**clock.seconds, "steps": len(losses)})
        record.losses.append(losses)
        record.constraints.append(constraints)
        record.capacity.append(self.method.capacity())
        record.add_row(scores)
        record.save(self.folder)
        seen = record.matrix()[index, : index + 1]
        logger.info(
            "%s: task %d of %d, %s, just learned %.1f; mean of tasks so far %.1f",
            *(self.folder.name, index + 1, len(self.stream.tasks), stage.task.name, seen[-1], seen.mean()),
        )

    def _train(self, model: nn.Module, stage: Stage, clock: _Clock, progress: Progress) -> list[float]:
        training = self.training
        optimizer = self.method.make_optimizer(model)
        steps = training.epochs * math.ceil(stage.task.size("train") / training.batch_size)
        if not steps:
            raise ValueError(f"task {stage.task.name} has no training examples")
        schedule = warmup_cosine(optimizer, steps, warmup=training.warmup)
        losses: list[float] = []
        for epoch in range(training.epochs):
            order = stage.generator(f"order {epoch}")
            for batch in stage.task.batches("train", batch_size=training.batch_size, generator=order):
                optimizer.zero_grad(set_to_none=True)
                loss = self.method.loss(model, stage.task, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                with clock.share("optimizer"):
                    optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"the loss of {stage.task.name} became {losses[-1]} at step {len(losses)}: "
                        "lower the learning rate; the finished tasks are kept"
                    )
                self._tell(replace(progress, step=len(losses), steps=steps, loss=losses[-1]))
        return losses

    def _evaluated(self, model: nn.Module, progress: Progress) -> list[Mapping[str, float]]:
        rows = []
        for position, task in enumerate(self.stream.tasks):
            self._tell(replace(progress, step=position, steps=len(self.stream.tasks)))
            rows.append(task.scores(model, self.training.evaluate_on))
        return rows

    def _stage(self, index: int) -> Stage:
        return Stage(
            task=self.stream.tasks[index],
            index=index,
            targets=self.stream.targets,
            seed=self.training.seed,
            batch_size=self.training.batch_size,
        )

    def _progress(self, index: int, phase: str) -> Progress:
        return Progress(self.stream.tasks[index].name, index, len(self.stream.tasks), phase)

    def _task_folder(self, index: int) -> Path:
        return self.folder / "tasks" / f"{index + 1:02d}-{self.stream.tasks[index].name}"


def warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: float) -> LambdaLR:
    """A schedule that rises linearly over the share ``warmup`` of the steps, then falls as a cosine to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return LambdaLR(optimizer, factor)


def _constraint_errors(model: nn.Module) -> dict[str, float]:
    """The worst constraint errors over all adapters' points; empty where no adapter has a manifold."""
    errors = [
        manifold.constraint_error(point)
        for adapter in adapters_of(model).values()
        if isinstance(adapter, OnManifolds)
        for _, point, manifold in adapter.manifold_parameters()
    ]
    if not errors:
        return {}
    return {
        "orthonormality": max(error.orthonormality for error in errors),
        "protection": max(error.protection for error in errors),
    }


class _Clock:
    """Seconds by phase: laps follow each other, shares lie inside a lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap under ``phase``."""
        present = time.perf_counter()
        self.seconds[phase] = present - self._last
        self._last = present

    def share(self, phase: str) -> _Share:
        """A context whose time is added to ``phase``."""
        return _Share(self, phase)


class _Share:
    def __init__(self, clock: _Clock, phase: str) -> None:
        self._clock, self._phase = clock, phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        self._clock.seconds[self._phase] = self._clock.seconds.get(self._phase, 0.0) + spent
