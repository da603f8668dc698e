"""The searches and the study on lm-four: all searches side by side, then the cells of ``lm-four.toml``.

    python benchmarks/lm_four.py --device cuda --processes 15     # minutes
    python benchmarks/lm_four.py --device cpu --processes 2       # hours

The model is loaded once, and every run is a process of its own. Finished trials and cells are kept: the same command
goes on from there. ``--search-seconds`` starts no trial after that time; all methods then count as many trials as the
one that has fewest. The winners' figures are written as the table ``results/lm-four/searches.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import tune

from manifold_cl.continual.environment import machine
from manifold_cl.continual.task import TaskStream
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream
from manifold_cl.study import Study, read_plan

HERE = Path(__file__).parent
METHODS = ("eblora", "restricted", "keeplora", "balanced", "lora_muon", "sequential_merge")
"""Slowest first, so that all end together."""
TABLE = HERE / "results" / "lm-four" / "searches.md"
Job = Callable[[], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--search-seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    return run(preloaded(open_stream("lm-four")), options)


def preloaded(stream: TaskStream) -> TaskStream:
    """The stream with its model in memory, which forked processes share."""
    model = stream.make_model()
    return replace(stream, make_model=lambda: copy.deepcopy(model))


def run(stream: TaskStream, options: argparse.Namespace) -> int:
    """Searches, then cells; the number of failures, at most 1."""
    with tempfile.TemporaryDirectory() as place:
        counts = search(stream, options, Path(place))
    if not min(counts):
        print("a search has no trial yet", file=sys.stderr)
        return 1
    TABLE.write_text(table(), encoding="utf-8")
    plan = replace(read_plan(HERE / "lm-four.toml"), device=options.device, processes=options.processes, threads=1)
    plan.opened.update(dict.fromkeys(plan.orders, stream))
    study = Study(plan, HERE / "results" / "lm-four")
    study.folder.mkdir(parents=True, exist_ok=True)
    study.validate()
    plan.save(study.folder)
    cells = [(cell.name, plan.make_runner(cell, study.folder)) for cell in study.pending()]
    in_processes([(name, partial(runner.run, resume=True)) for name, runner in cells], options.processes)
    return int(bool(study.pending()))


def table() -> str:
    """The winners of the searches, best first, as a Markdown table: seed 100, validation parts."""
    rows = []
    for method in METHODS:
        _, _, done = tune.read_search(f"lm-four/{method}")
        best = max(done, key=lambda result: result["mfn"])
        options = ", ".join(f"{key}={value}" for key, value in best["options"].items())
        edge = "yes" if best["options"]["lr"] in (f(t["options"]["lr"] for t in done) for f in (min, max)) else "no"
        figures = (f"{best[figure]:.1f}" for figure in ("mft", "mfn", "bwt"))
        width = best["updates"]["participation_ratio"]
        rows.append((best["mfn"], method, *figures, f"{width:.1f}", options, edge))
    head = ("method", "MFT", "MFN", "BWT", "participation ratio", "options", "rate on the edge")
    lines = [f"| {' | '.join(head)} |", "|---|--:|--:|--:|--:|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row[1:])} |" for row in sorted(rows, reverse=True))]) + "\n"


def search(stream: TaskStream, options: argparse.Namespace, place: Path) -> list[int]:
    """Run the trials that have no result, first trials first; the number of counted trials of each method."""
    searches = [tune.read_search(f"lm-four/{method}") for method in METHODS]
    names = {}
    queues: list[list[tuple[str, Job]]] = []
    for method, (listed, _, done) in zip(METHODS, searches, strict=True):
        known = [result["options"] for result in done]
        queues.append([])
        for index, trial in enumerate(listed["trials"]):
            if trial not in known:
                name = f"{method}-{index}"
                names[name] = method
                queues[-1].append((name, partial(one_trial, stream, listed, trial, options.device, place / name)))
    jobs = [job for each in zip_longest(*queues) for job in each if job is not None]
    in_processes(jobs, options.processes, until=time.monotonic() + options.search_seconds)
    machines = []
    for method, (listed, _, done) in zip(METHODS, searches, strict=True):
        machines += collect(listed, done, [place / name for name, owner in names.items() if owner == method])
    count = min(len(done) for _, _, done in searches)
    for listed, path, done in searches:
        del done[count:]
        if machines and done:
            tune.save_search(path, listed, done, tasks=stream.task_names, machine=machines[0], device=options.device)
    return [len(done) for _, _, done in searches]


def collect(listed: dict, done: list[dict], files: Sequence[Path]) -> list[dict]:
    """Add the results in the files that exist to ``done``, in the order of the list; the machines they ran on."""
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    done += [each["result"] for each in found]
    done.sort(key=lambda result: listed["trials"].index(result["options"]))
    return [each["machine"] for each in found]


def one_trial(stream: TaskStream, listed: dict, trial: dict, device: str, path: Path) -> None:
    """Run one trial and write its result, with the machine: only this process may ask for the GPU's name."""
    result = tune.run_trial(stream, listed, trial, device)
    write_json(path, {"result": result, "machine": machine()})


def in_processes(jobs: Sequence[tuple[str, Job]], count: int, *, until: float = float("inf")) -> None:
    """Run the jobs in forked processes, ``count`` at a time; none is started after ``until``."""
    context = multiprocessing.get_context("fork")  # before this process uses the GPU
    waiting, running, start = list(jobs), {}, time.monotonic()
    while waiting or running:
        while waiting and len(running) < count and time.monotonic() < until:
            name, job = waiting.pop(0)
            running[name] = context.Process(target=job)
            running[name].start()
        if not running:
            break
        time.sleep(0.2)
        for name in [name for name, process in running.items() if process.exitcode is not None]:
            process: BaseProcess = running.pop(name)
            word = "done" if process.exitcode == 0 else f"failed ({process.exitcode})"
            print(f"{time.monotonic() - start:6.0f} s  {name}: {word}", flush=True)
    for name, _ in waiting:
        print(f"not started in time: {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
