"""Searches: lists of trials, the plan that runs them as cells of a study, and the files of their results."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from manifold_cl.continual import METHODS, RunRecord, make_method
from manifold_cl.continual.finite_weights import validate_finite_weights
from manifold_cl.files import FileError, loads, read_text, write_json
from manifold_cl.kinds import is_of_kind
from manifold_cl.plugins import unknown
from manifold_cl.streams.user_streams import open_named
from manifold_cl.study.engine import Engine
from manifold_cl.study.estimate import Costs, Estimate
from manifold_cl.study.events import CellFailure, Event
from manifold_cl.study.plan import DEFAULT, Cell, MethodEntry, StudyPlan
from manifold_cl.study.search import validate_results
from manifold_cl.study.supervisor import Study, locked
from manifold_cl.study.validation import named, validate_label, validate_seeds

FIGURES = ("mft", "mfn", "maa", "bwt", "fwt")
CRITERION = "highest mfn"
KEYS: Mapping[str, tuple[type, str]] = {
    "method": (str, "the name of a method"),
    "stream": (str, "the name of a stream"),
    "seed": (int, "a whole number"),
    "trials": (list, "a list of tables of options"),
    "evaluate_on": (str, "test or validation"),
}
"""Keys of a list: the kind of each value, in Python and in words."""
FOLDER = "trials"
"""Folder beside the results for trials that run."""
NAME = "search"
"""Name of the plan in that folder."""

UpdateMeasures = Callable[[Path, str], Mapping[str, float]]
"""Takes the folder of a run and the name of its method; measures of its updates for the results."""


@dataclass(frozen=True)
class Search:
    """A list of trials of one method, and the folder of its results.

    Args:
        name: of the list, without ``.json``; the results are ``tuning-NAME.json``.
        method: a name of `METHODS`.
        stream: as in `StudyPlan`.
        seed: of every trial.
        trials: options of the method, one table per trial.
        evaluate_on: part of the tasks' data that gives the scores.
        out: folder of the results.
        code_folder: of the list's file, for a stream that is code.
    """

    name: str
    method: str
    stream: str
    seed: int
    trials: tuple[Mapping[str, Any], ...]
    evaluate_on: str
    out: Path
    code_folder: Path

    @classmethod
    def read(cls, path: Path, out: Path) -> Search:
        """The search in a file.

        Raises:
            FileError: no such file, or no JSON.
            ValueError: an unknown or missing key, an unknown method or option, two equal trials.
            TypeError: a value of the wrong kind.
        """
        text = read_text(path)
        try:
            content = loads(text)
        except (ValueError, RecursionError) as error:
            raise FileError(f"{path} is not JSON ({error}): a search is a table with {', '.join(KEYS)}") from None
        with named(path):
            _validate(content)
            validate_label("the name of the list", path.stem)
            for index, options in enumerate(content["trials"]):
                with named(f"trials[{index}]"):
                    make_method(content["method"], **options)
            values = {"evaluate_on": "test", **content, "trials": tuple(content["trials"])}
            return cls(name=path.stem, out=out, code_folder=path.parent.resolve(), **values)

    @property
    def path(self) -> Path:
        """The file of the results."""
        return self.out / f"tuning-{self.name}.json"

    @property
    def group(self) -> tuple[str, int, str, Path]:
        """Equal for searches whose trials can be cells of one plan."""
        return self.stream, self.seed, self.evaluate_on, self.code_folder

    def validate_device(self, device: str) -> None:
        """Raise ValueError for trials to run on another device than those with a result, which may round otherwise."""
        if self.pending() and (there := self._known().get("device", device)) != device:
            raise ValueError(
                f"{self.path} holds trials that ran on {there}, and the rest would run on {device}: choose --device "
                f"{there}, or move the file away"
            )

    def results(self) -> list[dict[str, Any]]:
        """The trials that have a result.

        Raises:
            FileError: the file holds no search.
            ValueError: it holds trials of another method, stream, seed, or part of the data.
        """
        return list(self._known().get("trials", []))

    def pending(self) -> list[int]:
        """Indices of the trials without a result."""
        known = [result["options"] for result in self.results()]
        return [index for index, options in enumerate(self.trials) if options not in known]

    def label(self, index: int) -> str:
        """The label of a trial's cell: another one for other options, so that no trial resumes a different one."""
        text = json.dumps([self.method, *map(str, self.group[:3]), self.trials[index]], sort_keys=True)
        return f"{self.name[:80]}-{index + 1}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def save(self, index: int, record: RunRecord, device: str, updates: Mapping[str, float]) -> None:
        """Add the result of a trial to the file, with the winner so far; ValueError without a finite MFN."""
        if not math.isfinite(record.metrics["mfn"]):
            raise ValueError(f"MFN is {record.metrics['mfn']}: a task has a score that is not finite")
        result = trial_result(self.trials[index], record, updates)
        place = {json.dumps(options, sort_keys=True): index for index, options in enumerate(self.trials)}
        trials = sorted(  # as in the list, so that the winner among equals is not the one that ended first
            [*self.results(), result],
            key=lambda trial: place.get(json.dumps(trial["options"], sort_keys=True), len(place)),
        )
        write_json(self.path, self._known() | {
            "method": self.method,
            "stream": self.stream,
            "tasks": list(record.tasks),
            "evaluate_on": self.evaluate_on,
            "seed": self.seed,
            "criterion": CRITERION,
            "winner": max(trials, key=lambda trial: trial["mfn"])["options"],
            "trials": trials,
            "versions": record.versions,
            "machine": record.machine,
            "device": device,
        })  # fmt: skip

    def _known(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        content = validate_results(self.path, "the results of the search")
        here = {"method": self.method, "stream": self.stream, "seed": self.seed, "evaluate_on": self.evaluate_on}
        there = {"seed": self.seed, "evaluate_on": "test", **content}
        if differing := [f"{k} {there[k]!r} instead of {here[k]!r}" for k in here if there[k] != here[k]]:
            raise ValueError(f"{self.path} holds trials of another search ({', '.join(differing)}): move it away")
        return content


def trial_result(options: Mapping[str, Any], record: RunRecord, updates: Mapping[str, float]) -> dict[str, Any]:
    """The entry of a trial in a file of results; figures that one task alone does not have are None.

    Its seconds are those of learning, without evaluation.
    """
    seconds = sum(timing.get(phase, 0) for timing in record.timings for phase in ("prepare", "train", "finish"))
    return {
        "options": dict(options),
        **{name: round(figure, 2) if math.isfinite(figure := record.metrics[name]) else None for name in FIGURES},
        "seconds": round(seconds, 1),
        "capacity": record.capacity[-1],
        "updates": dict(updates),
    }


@dataclass(frozen=True)
class Resources:
    """What the trials of all searches run with; the fields are those of `StudyPlan`."""

    device: str = "cpu"
    threads: int = 1
    processes: int | None = None
    cpus: float | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class SearchGroup:
    """Searches on one stream with one seed, and the plan with a cell per trial."""

    searches: tuple[Search, ...]
    resources: Resources

    @cached_property
    def plan(self) -> StudyPlan:
        """Every trial as a method of a study, none compared with another.

        Raises ValueError or TypeError as `open_named`, or for options that do not fit the training.
        """
        first, wanted = self.searches[0], self.resources
        with named(f"{first.name}.json: stream"):
            stream = open_named(first.stream, code_folder=first.code_folder)
        entries = [
            MethodEntry(search.label(index), search.method, options)
            for search in self.searches
            for index, options in enumerate(search.trials)
        ]
        plan = StudyPlan(
            name=NAME,
            stream=first.stream,
            entries=tuple(entries),
            reference=entries[0].label,
            seeds=(first.seed,),
            orders={DEFAULT: list(stream.task_names)},
            training={"evaluate_on": first.evaluate_on},
            device=wanted.device,
            threads=wanted.threads,
            processes=wanted.processes or max(1, (os.cpu_count() or 1) // wanted.threads),
            cpus=wanted.cpus,
            gpus=wanted.gpus,
            code_folder=first.code_folder,
        )
        plan.opened[DEFAULT] = stream
        training = plan.make_training(first.seed)
        for entry in entries:
            with named(f"the trial {dict(entry.options)} of {entry.method}"):
                plan.make_method(entry.label).validate_training(training)
        return plan

    @cached_property
    def trials(self) -> dict[Cell, tuple[Search, int]]:
        """The trial of each cell."""
        pairs = [(search, index) for search in self.searches for index in range(len(search.trials))]
        return dict(zip(self.plan.cells, pairs, strict=True))

    def pending(self) -> list[Cell]:
        """The cells whose trials have no result."""
        pending = {(search.name, index) for search in self.searches for index in search.pending()}
        return [cell for cell, (search, index) in self.trials.items() if (search.name, index) in pending]

    def validate_model(self) -> None:
        """Raise ValueError for trials whose options do not fit the model, or for a model with NaN or infinite weights.

        A rank above a layer's does not fit.
        """
        stream = self.plan.open_stream(DEFAULT)
        model = stream.make_model()
        validate_finite_weights(model)
        for cell in self.pending():
            search, index = self.trials[cell]
            with named(f"{search.name}.json: trials[{index}]"):
                self.plan.make_method(cell.label).validate_model(model, stream.targets)

    def records(self) -> dict[Cell, RunRecord]:
        """The readable records of trials without a result."""
        return Study(self.plan, self.folder).records()

    @property
    def folder(self) -> Path:
        """The folder in which the trials run."""
        return self.searches[0].out / FOLDER

    def estimate(self, engine: Engine, on_label: Callable[[str], None]) -> list[Estimate]:
        """An estimate per pending trial: of its search's finished trials, or of the first pending one, measured."""
        pending = self.pending()
        first: dict[str, str] = {}
        for cell in pending:
            first.setdefault(self.trials[cell][0].name, cell.label)
        known = {search.name: [result["seconds"] for result in search.results()] for search in self.searches}
        tasks = len(self.plan.orders[DEFAULT])
        costs = engine.measure(self.plan, [label for name, label in first.items() if not known[name]], on_label)
        return [self._estimate(cell, costs, known, first, tasks) for cell in pending]

    def _estimate(
        self, cell: Cell, costs: Costs, known: Mapping[str, Sequence[float]], first: Mapping[str, str], tasks: int
    ) -> Estimate:
        name = self.trials[cell][0].name
        if seconds := known[name]:
            work = sum(seconds) / len(seconds) + costs.scoring * tasks
            return costs.estimate(cell.label, work, f"mean of {len(seconds)} done")
        return costs.estimate(cell.label, costs.work[first[name]], "measured")

    def run(self, engine: Engine, on_event: Callable[[Event], None], updates: UpdateMeasures) -> list[CellFailure]:
        """Run the trials without a result, write each result as it comes, and return the failures.

        A trial whose result is written leaves no other file. An interrupted one resumes from its last finished task.
        """
        failures = []
        if not self.pending():
            return []
        self._validate_folder()
        engine.validate(self.plan)
        with locked(self.folder):
            self.plan.save(self.folder)
            with closing(engine.run(self.plan, self.folder, self.pending())) as events:
                for event in events:
                    ended = self._finished(event, updates) if event.kind == "done" else event
                    on_event(ended)
                    if ended.kind == "failed":
                        failures.append(CellFailure(ended.cell, ended.message))
            if not failures:
                self._clean()
        return failures

    def _validate_folder(self) -> None:
        """Raise FileError if the folder is that of a study."""
        if (self.folder / "study.json").exists() and (name := StudyPlan.load(self.folder).name) != NAME:
            raise FileError(
                f"{self.folder} holds the study {name}, and trials need a folder there: choose another --out"
            )

    def _finished(self, event: Event, updates: UpdateMeasures) -> Event:
        """Write the result of a trial; an event of kind ``failed`` if it has none."""
        search, index = self.trials[event.cell]
        folder = self.folder / "cells" / event.cell.name
        try:
            search.save(index, RunRecord.load(folder), self.resources.device, updates(folder, search.method))
        except ValueError as error:
            return replace(event, kind="failed", message=str(error))
        shutil.rmtree(folder)
        return event

    def _clean(self) -> None:
        """Remove the files of this group's trials, and the folder if it holds nothing else."""
        cells, logs = self.folder / "cells", self.folder / "logs"
        for cell in self.plan.cells:
            shutil.rmtree(cells / cell.name, ignore_errors=True)  # of a process killed after it wrote the result
            (cells / f"{cell.name}.lock").unlink(missing_ok=True)
            (logs / f"{cell.name}.log").unlink(missing_ok=True)
        with suppress(OSError):  # another search's trials are there
            cells.rmdir()
            logs.rmdir()
            (self.folder / "study.json").unlink()
            (self.folder / "study.lock").unlink()
            self.folder.rmdir()


def read_searches(paths: Iterable[Path], out: Path, resources: Resources) -> list[SearchGroup]:
    """The searches in these files, in groups that run one after another.

    Raises:
        FileError: a file is missing or malformed.
        ValueError: a list is invalid, or two have the same name, which would be that of one file of results.
        TypeError: a value of the wrong kind.
    """
    searches: dict[str, Search] = {}
    for path in paths:
        search = Search.read(path, out)
        if search.name in searches:
            raise ValueError(
                f"two lists are named {search.name}, so both would write {search.path}: give each its own --out"
            )
        searches[search.name] = search
    groups: dict[tuple[str, int, str, Path], list[Search]] = {}
    for search in searches.values():
        search.validate_device(resources.device)
        groups.setdefault(search.group, []).append(search)
    return [SearchGroup(tuple(group), resources) for group in groups.values()]


def _validate(content: Any) -> None:
    if not isinstance(content, dict):
        raise TypeError(f"a search is a table with {', '.join(KEYS)}, got {type(content).__name__}")
    for key in content:
        if key not in KEYS:
            raise ValueError(unknown("key", key, KEYS))
    if missing := [key for key in KEYS if key not in content and key != "evaluate_on"]:
        raise ValueError(f"{', '.join(missing)} is missing: a search is a table with {', '.join(KEYS)}")
    for key, value in content.items():
        kind, words = KEYS[key]
        if not is_of_kind(value, kind):
            raise TypeError(f"{key} is {words}, got {value!r}")
    with named("seed"):
        validate_seeds([content["seed"]])
    if content["method"] not in METHODS:
        raise ValueError(unknown("method", content["method"], METHODS))
    if (part := content.get("evaluate_on", "test")) not in ("test", "validation"):
        raise ValueError(f"evaluate_on is test or validation, got {part!r}")
    trials = content["trials"]
    if not trials:
        raise ValueError("trials is empty: give at least one table of options")
    for index, options in enumerate(trials):
        if not isinstance(options, dict):
            raise TypeError(f"trials[{index}] is a table of options, got {options!r}")
        if options in trials[:index]:
            raise ValueError(f"trials[{index}] equals trials[{trials.index(options)}], {options}: delete one")
