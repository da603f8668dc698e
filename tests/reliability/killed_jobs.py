"""Jobs that may be killed at any moment: what they write, how they go on, and what their folders may hold meanwhile."""

import dataclasses
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import toy
from records import EXACT
from sudden_ends import Extent, measured
from torch import nn
from toy import frozen_model, toy_stream
from two_methods import CONFIG

from analysis import TrainingWatch, read_training_log, write_report, write_table
from manifold_cl import (
    ContinualRunner,
    EBLoRALinear,
    RunRecord,
    SubspaceMemory,
    cli,
    export_lora,
    inject_adapters,
    save_adapters,
)
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.study import Resources, Study, StudyPlan, read_plan, read_searches
from manifold_cl.study.engine import LocalEngine
from manifold_cl.study.events import Event
from manifold_cl.study.plan import Cell
from manifold_cl.study.worker import run_cell

State = Mapping[str, Any]
"""What readers find in a folder: equal states are equal bit for bit."""
OURS = {"rank": 4, "alpha": 8.0, "lr": 0.03, "scale_lr": 0.1, "energy": 0.9, "statistic_examples": 96}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "eblora": OURS,
    "sequential_merge": {"rank": 4, "alpha": 8.0, "lr": 0.03},
    "gpm": {},
    "ewc_lora": {"rank": 4},
    "e2lora": {"rank": 4},
    "slao": {"rank": 4},
}


def nothing(folder: Path) -> None:
    """The preparation of a job that starts in an empty folder."""


@dataclass(frozen=True)
class Job:
    """A call that writes into a folder.

    Args:
        work: the call; after a kill the same call is made again.
        state: what readers find in the folder.
        prepare: makes what is there before the call.
        resumes: whether a second call continues the first. Otherwise readers find at every moment what was there before
            the call, what it leaves, or what they refuse (an empty state).
    """

    work: Callable[[Path], object]
    state: Callable[[Path], State]
    prepare: Callable[[Path], None] = nothing
    resumes: bool = False

    def unbroken(self, folder: Path) -> tuple[State, State, Extent]:
        """The state before the call and after it, and its extent."""
        folder.mkdir()
        self.prepare(folder)
        before = self.state(folder)
        extent = measured(lambda: self.work(folder), folder)
        return before, self.state(folder), extent


def tensors_of(folder: Path) -> State:
    """The bytes of every tensor file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("[!.]*.safetensors"))}


def run_of(name: str, *, additional: bool = False) -> Job:
    """A run of a method on the toy stream."""

    def work(folder: Path) -> None:
        stream = toy_stream()
        if additional:
            stream = dataclasses.replace(stream, additional_parameters=AdditionalParameters(r"head\.weight", lr=0.01))
        method = make_method(name, **METHODS[name])
        ContinualRunner(stream, method, folder / "run", training=Training(epochs=1)).run(resume=True)

    return Job(work, lambda folder: run_state(folder / "run"), resumes=True)


def run_state(folder: Path) -> State:
    """The numbers of a run and its tensor files; empty without a record."""
    if not (folder / "record.json").exists():
        return {}
    record = RunRecord.load(folder)
    left_over = [path.name for path in folder.rglob(".*.tmp")] if record.status == "complete" else []
    return {**{name: getattr(record, name) for name in EXACT}, **tensors_of(folder), "left over": left_over}


def adapted_model(seed: int) -> nn.Module:
    """The toy model with adapters that are not zero."""
    model = frozen_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the first frames come from the global generator
        inject_adapters(model, ("inner", "outer"), lambda name, layer: EBLoRALinear(layer, 4, initial_scale=0.5))
    return model


def files_of(folder: Path, *names: str) -> State:
    """The bytes of the named files that are there."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def adapters_saved() -> Job:
    def save(folder: Path, seed: int) -> None:
        save_adapters(adapted_model(seed), folder, task="first")

    return Job(lambda f: save(f, 1), lambda f: files_of(f, "adapter.safetensors"), lambda f: save(f, 0))


def adapters_exported() -> Job:
    """Three files; PEFT's readers refuse a folder without the configuration, which is written last."""

    def export(folder: Path, seed: int) -> None:
        export_lora(adapted_model(seed), folder)

    def state(folder: Path) -> State:
        found = files_of(folder, "adapter_config.json", "adapter_model.safetensors")
        return found if "adapter_config.json" in found else {}

    return Job(lambda f: export(f, 1), state, lambda f: export(f, 0))


def memory_of(seed: int) -> SubspaceMemory:
    draw = torch.Generator().manual_seed(seed)
    directions = {name: torch.randn(400, 4, generator=draw) for name in ("first", "second", "third")}
    return SubspaceMemory({name: ProtectedSubspace.from_directions(a, rank=3) for name, a in directions.items()})


def memory_saved() -> Job:
    def save(folder: Path, seed: int) -> None:
        memory_of(seed).save(folder)

    return Job(lambda f: save(f, 1), lambda f: files_of(f, "memory.safetensors"), lambda f: save(f, 0))


def command(*arguments: object) -> None:
    """The command line in this process; RuntimeError unless it succeeds."""
    try:
        cli.main([str(each) for each in arguments])
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{arguments[0]} ended with code {ended.code}") from ended


def subspaces_built(*, grown: bool = False) -> Job:
    """Protected subspaces from tasks by the command, over older ones or grown from them."""
    stream = ("--stream", f"{toy.__file__}:toy_stream", "--rank", 4, "--energy", 0.9, "--examples", 96)

    def build(folder: Path, tasks: str, *more: object) -> None:
        command("subspace", "build", "--out", folder, *stream, "--tasks", tasks, "--json", *more)

    def prepare(folder: Path) -> None:
        build(folder / "old", "first")

    def work(folder: Path) -> None:
        if grown:
            build(folder / "new", "second", "--memory", folder / "old")
        else:
            build(folder / "old", "first,second")

    return Job(work, lambda f: files_of(f, "old/memory.safetensors", "new/memory.safetensors"), prepare)


def adapters_merged() -> Job:
    """The command writes a new folder, which is there with all of its files or not at all."""

    def prepare(folder: Path) -> None:
        for seed in (0, 1):
            save_adapters(adapted_model(seed), folder / f"task-{seed}", task=f"task-{seed}")

    def work(folder: Path) -> None:
        if not (folder / "merged").exists():  # the command refuses a folder that is not empty
            tasks = (folder / "task-0", folder / "task-1")
            command("analyze", "merge", *tasks, "--rule", "mean", "--out", folder / "merged")

    def state(folder: Path) -> State:
        found = [path for path in sorted((folder / "merged").rglob("*")) if path.is_file()]
        return {str(p.relative_to(folder)): p.suffix == ".html" or p.read_bytes() for p in found}  # pages name paths

    return Job(work, state, prepare)


class ThisProcess(LocalEngine):
    """Runs the cells in this process, since starting one costs seconds."""

    def run(self, plan: StudyPlan, folder: Path, cells: Sequence[Cell]) -> Generator[Event, None, None]:
        for cell in cells:
            yield Event(cell, "started")
            run_cell(plan, cell, folder)
            yield Event(cell, "done")


def study_run() -> Job:
    """A study of two methods."""

    def prepare(folder: Path) -> None:
        (folder / "study.toml").write_text(CONFIG.replace("[0, 1]", "[0]").replace("epochs = 2", "epochs = 1"))

    def work(folder: Path) -> None:
        failures = Study(read_plan(folder / "study.toml"), folder / "study").run(engine=ThisProcess())
        assert not failures

    def state(folder: Path) -> State:
        cells = (folder / "study" / "cells").glob("*/record.json")
        runs = {str(path.parent.relative_to(folder)): run_state(path.parent) for path in cells}
        return {**files_of(folder, "study/study.json"), **runs}

    return Job(work, state, prepare, resumes=True)


def search_run() -> Job:
    """A search of three trials."""
    trials = [{"rank": 4, "lr": lr, "alpha": 8.0} for lr in (0.01, 0.03, 0.1)]
    wanted = {"method": "sequential_merge", "stream": f"{toy.__file__}:toy_stream", "seed": 0, "trials": trials}

    def prepare(folder: Path) -> None:
        (folder / "rates.json").write_text(json.dumps(wanted))

    def work(folder: Path) -> None:
        for group in read_searches([folder / "rates.json"], folder / "out", Resources(processes=1)):
            assert not group.run(ThisProcess(), lambda event: None, lambda folder, method: {})

    def state(folder: Path) -> State:
        path = folder / "out" / "tuning-rates.json"
        if not path.exists():
            return {}
        content = json.loads(path.read_text())
        results = [{key: value for key, value in trial.items() if key != "seconds"} for trial in content["trials"]]
        done = len(results) == len(trials)
        left_over = sorted(p.name for p in path.parent.iterdir() if p.name != path.name) if done else []
        return {"winner": content["winner"], "trials": results, "left over": left_over}

    return Job(work, state, prepare, resumes=True)


def training_watched(ending: Literal["parquet", "csv"]) -> Job:
    """Four measurements of adapters; a training that goes on measures its last steps again."""

    def work(folder: Path) -> None:
        watch = TrainingWatch(folder, file_format=ending, page=False)
        for step in range(4):
            watch.measure(adapted_model(step), step=step)

    def state(folder: Path) -> State:
        try:
            log = read_training_log(folder)
        except FileNotFoundError:
            return {}
        return {str(step): rows.drop(columns="step").to_csv() for step, rows in log.groupby("step")}

    return Job(work, state, resumes=True)


def table_written(ending: str) -> Job:
    """A table over an older one."""

    def write(folder: Path, rows: int) -> None:
        write_table(
            pd.DataFrame({"layer": ["inner", "outer"] * rows, "value": range(2 * rows)}), folder / f"t.{ending}"
        )

    return Job(lambda f: write(f, 90), lambda f: files_of(f, f"t.{ending}"), lambda f: write(f, 9))


def report_written() -> Job:
    """The page of a run over an older page."""

    def prepare(folder: Path) -> None:
        save_adapters(adapted_model(0), folder / "task", task="task")
        (folder / "page.html").write_text("old")

    def work(folder: Path) -> None:
        write_report(folder / "page.html", {"task": folder / "task"})

    def state(folder: Path) -> State:
        """The page without the minute in which it was written."""
        return {
            name: re.sub(rb"[\d-]+ \d\d:\d\d UTC", b"", page) for name, page in files_of(folder, "page.html").items()
        }

    return Job(work, state, prepare)
