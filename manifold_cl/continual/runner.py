"""The loop over tasks: train, merge, evaluate and record each, resuming after the last finished task."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from manifold_cl.adapters import adapters_of
from manifold_cl.continual.environment import Clock, library_versions, machine, utc_now
from manifold_cl.continual.finite_weights import require_finite_weights, validate_finite_weights
from manifold_cl.continual.losses import divergence
from manifold_cl.continual.method import Method
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.record import RunRecord
from manifold_cl.continual.run_folder import RunFolder
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import Task, TaskStream
from manifold_cl.continual.training import Training
from manifold_cl.continual.training_loop import TrainingJob, TrainingLoop
from manifold_cl.optim.groups import OnManifolds
from manifold_cl.rules import validate_kind

logger = logging.getLogger("manifold_cl")

LARGEST_RESIDUAL = 2e-6
"""Largest constraint residual after training in float32 (docs/geometry.md); a run warns of larger ones."""

NO_TRAINING: Mapping[str, Any] = MappingProxyType({"losses": [], "constraints": {}, "timings": {}})
"""The training result of a stage without training."""


@dataclass(frozen=True)
class Progress:
    """The state of a run, for a progress display.

    Phases of a task: ``prepare``, ``train``, ``finish``, ``evaluate``, and ``statistics`` within ``prepare`` and
    ``finish``, where ``step`` counts the batches of one pass.
    """

    task: str
    index: int
    tasks: int
    phase: str
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    passes: int = 0
    """Number of the pass for statistics, from 1."""
    seconds_left: float = math.nan
    """Estimated time to the end of the pass for statistics; NaN before its first batch is done."""


class ContinualRunner:
    """Runs one method over one stream into one folder.

    Args:
        stream: tasks and pre-trained model.
        method: a fresh instance, since methods have state.
        folder: for the record, adapters and memory.
        training: options that are the same for all methods.
        device: of the model.
        details: further entries of the configuration, such as the number of examples per task.
        on_progress: called at every step and phase.
        loop: trains a task; the project's own loop by default.
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
        loop: TrainingLoop | None = None,
    ) -> None:
        validate_kind("stream", stream, TaskStream, remedy="give the TaskStream that the function returns")
        validate_kind("method", method, Method, remedy="give make_method(name, ...)")
        training = Training() if training is None else training
        validate_kind("training", training, Training, remedy="give Training(epochs=..., seed=...)")
        self.stream, self.method, self.training, self.folder = stream, method, training, Path(folder)
        self.device, self.ranks, self.on_progress = torch.device(device), Ranks.current(), on_progress
        self.loop = loop or TrainingLoop()
        stream.validate_names()
        self.training.validate_tasks(len(stream.tasks))
        method.validate_training(self.training)
        self._files = RunFolder(self.folder, stream.task_names)
        config = {
            "method": method.name,
            "stream": stream.name,
            "tasks": list(stream.task_names),
            "device": str(self.device),
            **self.training.to_dict(),
            **method.options(),
            **(details or {}),
        }
        if method.keeps_updates:
            config["merge"] = "keep"
        if digests := {task.name: digest for task in stream.tasks if (digest := task.digest())}:
            config["data"] = digests
        if stream.additional_parameters is not None:
            config["companions"] = asdict(stream.additional_parameters)
        if stream.general:
            config["general"] = [task.name for task in stream.general]
        if self.ranks.count > 1:
            config["ranks"] = self.ranks.count
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # as in the file: lists for tuples

    def validate(self, *, resume: bool = False) -> None:
        """Raise the errors of `run` about the folder and the sizes of the tasks, without running."""
        if self._open_record(resume).status != "complete" and self.folder.exists() and self.ranks.writes:
            with self._files.locked():
                pass

    def run(self, *, resume: bool = False) -> RunRecord:
        """Run all tasks that are not in the folder yet, and return the complete record.

        Args:
            resume: continue the run in the folder, which needs the same configuration. On the CPU the numbers are bit
                for bit those of an uninterrupted run. Tasks are learned again from the first one with damaged files.

        Raises:
            FileError: when the folder holds a run and ``resume`` is off, a run of another configuration (the
                differences are listed), or a damaged one, or when another process runs in it. Nothing is overwritten.
            FloatingPointError: when the training diverged; the finished tasks are kept.
            ValueError: for a pre-trained model with a weight that is NaN or infinite.
        """
        record = self._open_record(resume)
        if record.status == "complete":
            return record
        with self._files.locked() if self.ranks.writes else nullcontext():
            return self._run(self._open_record(resume))  # again: another process may have written before the lock

    def _run(self, record: RunRecord) -> RunRecord:
        self.ranks.barrier()  # every rank has read the folder before the first one writes
        if record.status == "complete":
            return record
        self._files.drop_damaged(record, [i for i in range(record.done) if self._trains(i)])
        model = self._pretrained_model()
        additional = self.stream.additional_parameters
        if additional is not None:
            record.provenance["companions"] = additional.provenance(model)
        if not record.zero_shot:
            start = self._progress(0, "zero-shot")
            rows = self._evaluate(model, start, self.stream.tasks, done=0)
            if odd := [row for row in rows if row.keys() != rows[0].keys()]:
                raise ValueError(f"all tasks have the same scores, got {list(rows[0])} and {list(odd[0])}")
            record.zero_shot = {name: [float(row[name]) for row in rows] for name in rows[0]}
            record.primary = next(iter(record.zero_shot))
            record.general = {name: [score] for name, score in self._general(model, start, done=0).items()}
            self._save(record)
        unfinished = self.method.trains and record.done < len(self.stream.tasks)
        result = self._files.learned(record) if unfinished else None
        self._restore(model, record.done + (result is not None))
        for index in range(record.done, len(self.stream.tasks)):
            self._run_task(model, index, record, result)
            result = None
        record.status, record.finished = "complete", utc_now()
        record.stored = self._storage()
        self._save(record)
        return record

    def learned_model(self, record: RunRecord) -> nn.Module:
        """The model after the tasks of ``record``, from the pre-trained one and the files of this run."""
        model = self._pretrained_model()
        self._restore(model, record.done)
        return model

    def _pretrained_model(self) -> nn.Module:
        model = self.loop.place(self.stream.make_model(), self.device)
        validate_finite_weights(model)
        self.method.validate_model(model, self.stream.targets)
        for task in self.stream.tasks:
            task.validate_model(model)
        return model

    def _restore(self, model: nn.Module, done: int) -> None:
        """Set model and method to their state after the first ``done`` tasks."""
        folders = [self._files.task(index) for index in range(done) if self._trains(index)]
        self.method.restore(model, folders)
        if self.stream.additional_parameters is not None and folders:
            self.stream.additional_parameters.load(model, folders[-1])

    def _open_record(self, resume: bool) -> RunRecord:
        for split in ("train", self.training.evaluate_on) if self.method.trains else (self.training.evaluate_on,):
            self.stream.validate_examples(split)
        return self._files.record(self.config, resume=resume) or RunRecord(
            name=self.folder.name,
            method=self.method.name,
            stream=self.stream.name,
            config=self.config,
            tasks=list(self.stream.task_names),
            versions=library_versions(),
            machine=machine(),
            provenance=dict(self.stream.provenance),
            started=utc_now(),
            run=uuid.uuid4().hex,
        )

    def _run_task(self, model: nn.Module, index: int, record: RunRecord, result: Mapping[str, Any] | None) -> None:
        """Train one task, unless there is a ``result``, then evaluate all tasks and append to the record."""
        stage = self._stage(index)
        progress = self._progress(index, "prepare")
        if result is None:
            result = NO_TRAINING
            if (task := self.method.training_task(stage)) is not None:
                result = self._train(model, replace(stage, task=task), progress)
                self._warn_of_divergence(stage, result["losses"], record)
                if self.ranks.writes:
                    self._files.require_lock()
                    self._files.save_learned(index, record, result)
            self.ranks.barrier()
        clock = Clock()
        progress = replace(progress, phase="evaluate")
        scores = self._evaluate(model, progress, self.stream.tasks, done=index + 1)
        general = self._general(model, progress, done=index + 1)
        clock.lap("evaluate")
        record.timings.append({**result["timings"], **clock.seconds, "steps": len(result["losses"])})
        record.losses.append(result["losses"])
        record.constraints.append(result["constraints"])
        record.capacity.append(self.method.capacity())
        record.add_row(scores, general)
        self._save(record)
        if self.ranks.writes:
            seen = record.matrix()[index, : index + 1]
            logger.info(
                "%s: task %d of %d, %s, just learned %.1f; mean of tasks so far %.1f",
                *(self.folder.name, index + 1, len(self.stream.tasks), stage.task.name, seen[-1], seen.mean()),
            )

    def _train(self, model: nn.Module, stage: Stage, progress: Progress) -> dict[str, Any]:
        """Train one task, save its update and merge it; losses, constraints and timings."""
        stage = replace(stage, on_statistics=statistics_progress(progress, self._report))
        clock = Clock()
        self._report(progress)
        with self.loop.passes(model):
            self.method.begin_task(model, stage)
        clock.lap("prepare")

        def show(step: int, steps: int, loss: float) -> None:
            self._report(replace(progress, phase="train", step=step, steps=steps, loss=loss))

        job = TrainingJob(self.method, stage, self.training, self.ranks, self.stream.additional_parameters, clock, show)
        losses = self.loop.train(model, job)
        clock.lap("train")
        clock.seconds["optimizer"] /= clock.seconds["train"] or 1.0  # 0 by a coarse clock
        constraints = measure_constraints(model)
        self._warn_of_residuals(stage, constraints)
        self._report(replace(progress, phase="finish"))
        with self._files.all_or_nothing(stage.index) if self.ranks.writes else nullcontext():
            self._finish(model, stage)
        clock.lap("finish")
        return {"losses": losses, "constraints": constraints, "timings": clock.seconds}

    def _finish(self, model: nn.Module, stage: Stage) -> None:
        """Save the update of a task, merge it, and save what the method carries to the next one."""
        folder, additional = self._files.task(stage.index), self.stream.additional_parameters
        self.method.finish_task(model, stage)
        if self.ranks.writes:
            self._files.require_lock()
            self.method.save_update(model, folder, stage)
        if additional is not None:
            additional.freeze(model)
            if self.ranks.writes:
                additional.save(model, folder, task=stage.task.name)
        with self.loop.passes(model):
            self.method.end_task(model, stage)
        require_finite_weights(model, f"the merge of {stage.task.name}")
        self.ranks.validate_equal(model.parameters(), f"the weights after {stage.task.name}")
        if self.ranks.writes:
            self._files.require_lock()
            self.method.save_state(folder, stage)
        self.ranks.barrier()
        if not self.ranks.writes:  # the first rank's state, bit for bit
            self.method.load_state(folder)

    def _warn_of_divergence(self, stage: Stage, losses: Sequence[float], record: RunRecord) -> None:
        """Warn of a loss that rose above the largest one that a task of the run began with."""
        first = max((each[0] for each in (*record.losses, losses) if each), default=0.0)
        if (rise := divergence(losses, first)) is not None and self.ranks.writes:
            step, lowest, highest = rise
            logger.warning(
                "%s: the loss rose from %.2f to %.2f at step %d of %d, above the %.2f that training began with, so the "
                "task may be learned badly: lower the learning rate, or raise warmup",
                *(stage.task.name, lowest, highest, step, len(losses), first),
            )

    def _general(self, model: nn.Module, progress: Progress, *, done: int) -> dict[str, float]:
        """The primary score of each task that is only evaluated."""
        rows = self._evaluate(model, progress, self.stream.general, done=done)
        pairs = zip(self.stream.general, rows, strict=True)
        return {task.name: float(next(iter(row.values()))) for task, row in pairs}

    def _evaluate(
        self, model: nn.Module, progress: Progress, tasks: Sequence[Task], *, done: int
    ) -> list[Mapping[str, float]]:
        rows = []
        for index, task in enumerate(tasks):
            self._report(replace(progress, step=index, steps=len(tasks)))
            with self.loop.evaluation(model):
                rows.append(task.evaluate(model, self.training.evaluate_on, self._files.results(done, task.name)))
            remedy = 'return a table of percents, such as {"accuracy": 93.5}'
            validate_kind(f"what task {task.name} returns as scores", rows[-1], Mapping, remedy=remedy)
            if unknown := [name for name, value in rows[-1].items() if not math.isfinite(value)]:
                logger.warning(
                    "%s: the score %s of task %s is %s after %d tasks: it is unknown in the record, and so are the "
                    "metrics that need it",
                    *(self.folder.name, unknown[0], task.name, rows[-1][unknown[0]], done),
                )
        return rows

    def _storage(self) -> dict[str, int]:
        """Bytes of all updates on disk and of the method's state, and number of kept examples of other tasks.

        A tensor that several layers share counts once.
        """
        state = {(tensor.data_ptr(), tensor.shape): tensor for tensor in self.method.state()}
        stages = [self._stage(index) for index in range(len(self.stream.tasks))]
        return {
            "updates": self._files.update_bytes(),
            "state": sum(tensor.nbytes for tensor in state.values()),
            "old_examples": max(self.method.kept_examples(stage) for stage in stages),
        }

    def _save(self, record: RunRecord) -> None:
        if self.ranks.writes:
            self._files.require_lock()
            record.save(self.folder)
        self.ranks.barrier()

    def _report(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)

    def _warn_of_residuals(self, stage: Stage, constraints: Mapping[str, float]) -> None:
        for name, residual in constraints.items():
            if not residual <= LARGEST_RESIDUAL and self.ranks.writes:  # NaN as well
                logger.warning(
                    "%s: %s of the frames of task %s is off by %.1e, more than %.0e: keep them in float32, let nothing "
                    "but the optimizer write to them, or lower the learning rate",
                    *(self.folder.name, name, stage.task.name, residual, LARGEST_RESIDUAL),
                )

    def _trains(self, index: int) -> bool:
        """Whether this stage trains and writes an update."""
        return self.method.training_task(self._stage(index)) is not None

    def _stage(self, index: int) -> Stage:
        stream, training = self.stream, self.training
        return Stage(stream.tasks[index], index, stream.targets, training.seed, training.batch_size, tasks=stream.tasks)

    def _progress(self, index: int, phase: str) -> Progress:
        return Progress(self.stream.tasks[index].name, index, len(self.stream.tasks), phase)


def statistics_progress(progress: Progress, report: Callable[[Progress], None]) -> Callable[[int, int, int], None]:
    """For `Stage.on_statistics`: reports the batches of a pass as `Progress`, with an estimate of the time left."""
    began = 0.0

    def show(number: int, batch: int, batches: int) -> None:
        nonlocal began
        if not batch:
            began = time.monotonic()
        left = (time.monotonic() - began) / batch * (batches - batch) if batch else math.nan
        report(replace(progress, phase="statistics", step=batch, steps=batches, passes=number, seconds_left=left))

    return show


def measure_constraints(model: nn.Module) -> dict[str, float]:
    """The largest constraint residuals over all adapters' points; empty where no adapter has a manifold."""
    residuals = [
        manifold.constraint_error(point)
        for adapter in adapters_of(model).values()
        if isinstance(adapter, OnManifolds)
        for _, point, manifold in adapter.manifold_parameters()
    ]
    kinds = ("orthonormality", "protection") if residuals else ()
    return {kind: float(np.max([getattr(residual, kind) for residual in residuals])) for kind in kinds}  # NaN if one is
