"""The loop over tasks: learn, fold in, evaluate, write down; killed at any moment, it goes on from the last task."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from manifold_cl.adapters import adapters_of
from manifold_cl.continual.clock import Clock
from manifold_cl.continual.method import Method, Stage
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.record import RunRecord, library_versions, machine, now
from manifold_cl.continual.run_folder import RunFolder
from manifold_cl.continual.task import TaskStream
from manifold_cl.continual.training import Training, train, warmup_cosine
from manifold_cl.optim.groups import OnManifolds

__all__ = ["ContinualRunner", "Progress", "Training", "warmup_cosine"]

logger = logging.getLogger("manifold_cl")

PROMISED = 2e-6
"""Largest constraint error that training leaves in float32 (docs/geometry.md); beyond it there is a warning."""


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
        stream.require_names()
        self._files = RunFolder(self.folder, stream.task_names)
        self.training = training or Training()
        self.training.check(len(stream.tasks))
        method.check_training(self.training)
        self.device = torch.device(device)
        config = {
            "method": method.name,
            "stream": stream.name,
            "tasks": list(stream.task_names),
            "device": str(self.device),
            **self.training.plain(),
            **method.options(),
            **(details or {}),
        }
        if stream.companions is not None:
            config["companions"] = asdict(stream.companions)
        self.ranks = Ranks.present()
        if self.ranks.count > 1:
            config["ranks"] = self.ranks.count
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # as it will be read: tuples become lists
        self.on_progress = on_progress

    def check(self, *, resume: bool = False) -> None:
        """Raise what `run` would raise about the folder and the sizes of the tasks, before anything is spent."""
        if self._opened(resume).status != "complete" and self.folder.exists() and self.ranks.writes:
            with self._files.locked():
                pass

    def run(self, *, resume: bool = False) -> RunRecord:
        """Run all tasks that are not in the folder yet, and return the complete record.

        Args:
            resume: go on from what the folder holds; needs the same configuration. On the CPU the numbers are
                bit for bit those of a run that was never interrupted. Tasks from the first on whose files are not
                whole are noted and learned again.

        Raises:
            FileError: when the folder holds a run and ``resume`` is off, or one of another configuration (the
                differences are listed), or a damaged one, or when another process is at work on it. Nothing is
                overwritten.
            FloatingPointError: when the training diverged; the tasks finished so far are kept.
        """
        record = self._opened(resume)
        if record.status == "complete":
            return record
        with self._files.locked() if self.ranks.writes else nullcontext():
            return self._run(self._opened(resume))  # read again: another process may have written before the lock

    def _run(self, record: RunRecord) -> RunRecord:
        self.ranks.barrier()  # all have looked before the first one writes
        if record.status == "complete":
            return record
        self._files.drop_damaged(record, [i for i in range(record.done) if self._trains(i)])
        model = self.stream.make_model().to(self.device)
        self.method.check(model, self.stream.targets)
        if self.stream.companions is not None:
            record.provenance["companions"] = self.stream.companions.plain(model)
        if not record.zero_shot:
            record.zero_shot = self._zero_shot(model)
            record.primary = next(iter(record.zero_shot))
            self._save(record)
        next_may_be_learned = self.method.trains and record.done < len(self.stream.tasks)
        learned = self._files.learned(record) if next_may_be_learned else None
        finished = range(record.done + (learned is not None))
        folders = [self._files.task(i) for i in finished if self._trains(i)]
        self.method.restore(model, folders)
        if self.stream.companions is not None and folders:
            self.stream.companions.load(model, folders[-1])
        for index in range(record.done, len(self.stream.tasks)):
            self._learn(model, index, record, learned)
            learned = None
        record.status, record.finished = "complete", now()
        record.stored = self._stored()
        self._save(record)
        return record

    def _opened(self, resume: bool) -> RunRecord:
        for split in ("train", self.training.evaluate_on) if self.method.trains else (self.training.evaluate_on,):
            self.stream.require_examples(split)
        found = self._files.record(self.config, resume=resume)
        if found is not None:
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
            run=uuid.uuid4().hex,
        )

    def _tell(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)

    def _zero_shot(self, model: nn.Module) -> dict[str, list[float]]:
        rows = self._evaluated(model, self._progress(0, "zero-shot"), done=0)
        if odd := [row for row in rows if row.keys() != rows[0].keys()]:
            raise ValueError(f"all tasks have the same scores, got {list(rows[0])} and {list(odd[0])}")
        return {name: [float(row[name]) for row in rows] for name in rows[0]}

    def _learn(self, model: nn.Module, index: int, record: RunRecord, learned: Mapping[str, Any] | None) -> None:
        stage = self._stage(index)
        progress = self._progress(index, "prepare")
        if learned is None:
            lesson = self.method.lesson(stage)
            learned = (
                _NOTHING_LEARNED if lesson is None else self._trained(model, replace(stage, task=lesson), progress)
            )
            if lesson is not None and self.ranks.writes:
                self._files.require_lock()
                self._files.save_learned(index, record, learned)
            self.ranks.barrier()
        clock = Clock()
        scores = self._evaluated(model, replace(progress, phase="evaluate"), done=index + 1)
        clock.lap("evaluate")
        record.timings.append({**learned["timings"], **clock.seconds, "steps": len(learned["losses"])})
        record.losses.append(learned["losses"])
        record.constraints.append(learned["constraints"])
        record.capacity.append(self.method.capacity())
        record.add_row(scores)
        self._save(record)
        seen = record.matrix()[index, : index + 1]
        if self.ranks.writes:
            logger.info(
                "%s: task %d of %d, %s, just learned %.1f; mean of tasks so far %.1f",
                *(self.folder.name, index + 1, len(self.stream.tasks), stage.task.name, seen[-1], seen.mean()),
            )

    def _trained(self, model: nn.Module, stage: Stage, progress: Progress) -> dict[str, Any]:
        """Learn one task and fold it in; what the record will say of it."""
        folder, companions = self._files.task(stage.index), self.stream.companions
        clock = Clock()
        self._tell(progress)
        self.method.begin_task(model, stage)
        clock.lap("prepare")
        losses = self._train(model, stage, clock, replace(progress, phase="train"))
        clock.lap("train")
        clock.seconds["optimizer"] /= clock.seconds["train"] or 1.0  # a clock that is too coarse, or stood still
        constraints = _constraint_errors(model)
        self._report_leak(stage, constraints)
        self._tell(replace(progress, phase="finish"))
        self.method.finish_task(model, stage)
        if self.ranks.writes:
            self._files.require_lock()
            self.method.save_update(model, folder, stage)
        if companions is not None:
            companions.freeze(model)
            if self.ranks.writes:
                companions.save(model, folder, task=stage.task.name)
        self.method.end_task(model, stage)
        self.ranks.check_equal(model.parameters(), f"the weights after {stage.task.name}")
        if self.ranks.writes:
            self._files.require_lock()
            self.method.save_state(folder, stage)
        self.ranks.barrier()
        if not self.ranks.writes:  # equal up to rounding to what this rank has; now equal
            self.method.load_state(folder)
        clock.lap("finish")
        return {"losses": losses, "constraints": constraints, "timings": clock.seconds}

    def _stored(self) -> dict[str, int]:
        """What it costs to keep: bytes of all updates on disk, of the method's state, and examples of other tasks."""
        stages = [self._stage(index) for index in range(len(self.stream.tasks))]
        return {
            "updates": self._files.update_bytes(),
            "state": sum(tensor.numel() * tensor.element_size() for tensor in self.method.state()),
            "old_examples": max(self.method.kept_examples(stage) for stage in stages),
        }

    def _save(self, record: RunRecord) -> None:
        if self.ranks.writes:
            self._files.require_lock()
            record.save(self.folder)
        self.ranks.barrier()

    def _train(self, model: nn.Module, stage: Stage, clock: Clock, progress: Progress) -> list[float]:
        return train(
            model,
            self.method,
            stage,
            self.training,
            ranks=self.ranks,
            companions=self.stream.companions,
            timed=lambda: clock.share("optimizer"),
            on_step=lambda step, steps, loss: self._tell(replace(progress, step=step, steps=steps, loss=loss)),
        )

    def _evaluated(self, model: nn.Module, progress: Progress, *, done: int) -> list[Mapping[str, float]]:
        rows = []
        for position, task in enumerate(self.stream.tasks):
            self._tell(replace(progress, step=position, steps=len(self.stream.tasks)))
            rows.append(task.evaluate(model, self.training.evaluate_on, self._files.results(done, task.name)))
            if unknown := [name for name, value in rows[-1].items() if not math.isfinite(value)]:
                logger.warning(
                    "%s: the score %s of task %s is %s after %d tasks: it is unknown in the record, and so are the "
                    "metrics that need it",
                    *(self.folder.name, unknown[0], task.name, rows[-1][unknown[0]], done),
                )
        return rows

    def _report_leak(self, stage: Stage, constraints: Mapping[str, float]) -> None:
        for name, error in constraints.items():
            if not error <= PROMISED and self.ranks.writes:  # NaN as well
                logger.warning(
                    "%s: %s of the frames of task %s is off by %.1e, more than %.0e: keep them in float32, let nothing "
                    "but the optimizer write to them, or lower the learning rate",
                    *(self.folder.name, name, stage.task.name, error, PROMISED),
                )

    def _trains(self, index: int) -> bool:
        """Whether anything is learned, and written, at this stage."""
        return self.method.lesson(self._stage(index)) is not None

    def _stage(self, index: int) -> Stage:
        return Stage(
            task=self.stream.tasks[index],
            index=index,
            targets=self.stream.targets,
            seed=self.training.seed,
            batch_size=self.training.batch_size,
            tasks=self.stream.tasks,
        )

    def _progress(self, index: int, phase: str) -> Progress:
        return Progress(self.stream.tasks[index].name, index, len(self.stream.tasks), phase)


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
    return {  # NaN if one is
        "orthonormality": float(np.max([error.orthonormality for error in errors])),
        "protection": float(np.max([error.protection for error in errors])),
    }


_NOTHING_LEARNED: Mapping[str, Any] = MappingProxyType({"losses": [], "constraints": {}, "timings": {}})
