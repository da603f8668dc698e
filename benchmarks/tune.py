"""Run hyper-parameter searches on the validation stream, trial by trial, resumable.

    python benchmarks/tune.py sequential_merge olora --threads 1

Trials are listed in ``benchmarks/search/<name>.json``, the same number for every method of a stream; results go to
``benchmarks/results/tuning-<name>.json``. A name may begin with a folder: ``lm-four/eblora`` goes from
``benchmarks/search/lm-four/eblora.json`` to ``benchmarks/results/lm-four/tuning-eblora.json``. The winner is the
trial with the highest final accuracy (MFN), of equal ones the first. Each trial keeps measures of its updates' spectra,
as means over layers and tasks. A list may set ``evaluate_on`` to ``"validation"``, which a stream that is reported as
well needs: a study refuses options that were chosen on its own test texts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from analysis import AdapterSet, spectrum_table
from manifold_cl.continual import ContinualRunner, Training, make_method
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.continual.task import TaskStream
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream

HERE = Path(__file__).parent
KEPT = ("mft", "mfn", "maa", "bwt", "fwt")
MEASURES = (
    "participation_ratio",
    "effective_rank_energy",
    "effective_rank_roy_vetterli",
    "stable_rank",
    "spectral_norm",
    "frobenius",
)
"""Of the update of one layer and task (docs/analysis.md, "Spectra")."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="files of benchmarks/search, without .json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.names:
        tune(name, options.device)


def tune(name: str, device: str = "cpu") -> None:
    """Run the trials of one search that have no result yet, and print all."""
    search, path, done = read_search(name)
    stream = open_stream(search["stream"])
    for trial in search["trials"]:
        if any(result["options"] == trial for result in done):
            continue
        done.append(run_trial(stream, search, trial, device))
        print(name, done[-1], flush=True)
        save_search(path, search, done, tasks=stream.task_names, machine=machine(), device=device)
    show(name, search, done)


def read_search(name: str) -> tuple[dict[str, Any], Path, list[dict[str, Any]]]:
    """The list of a search, the file of its results, and the trials that are in it."""
    search = json.loads((HERE / "search" / f"{name}.json").read_text())
    place = Path(name)
    path = HERE / "results" / place.parent / f"tuning-{place.name}.json"
    known = json.loads(path.read_text()) if path.exists() else {"trials": []}
    part = search.get("evaluate_on", "test")
    if known["trials"] and (known["stream"], known.get("evaluate_on", "test")) != (search["stream"], part):
        raise ValueError(f"{path} holds trials on another stream or part of it: move it away")
    return search, path, known["trials"]


def save_search(
    path: Path,
    search: Mapping[str, Any],
    done: Sequence[Mapping[str, Any]],
    *,
    tasks: Sequence[str],
    machine: Mapping[str, Any],
    device: str,
) -> None:
    """Write the trials so far, with the winner."""
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    content = {
        **known,
        "method": search["method"],
        "stream": search["stream"],
        "tasks": list(tasks),
        "evaluate_on": search.get("evaluate_on", "test"),
        "seed": search["seed"],
        "criterion": "highest mfn",
        "winner": max(done, key=lambda r: r["mfn"])["options"],
        "trials": list(done),
        "versions": library_versions(),
        "machine": dict(machine),
        "device": device,
    }
    write_json(path, content)


def show(name: str, search: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> None:
    """Print the trials, best first."""
    table = Table(title=f"{name} on {search['stream']}, seed {search['seed']}")
    for column in ("options", *KEPT):
        table.add_column(column, justify="left" if column == "options" else "right")
    for result in sorted(done, key=lambda r: -r["mfn"]):
        said = ", ".join(f"{k}={v}" for k, v in result["options"].items())
        table.add_row(said, *(f"{result[figure]:.2f}" for figure in KEPT))
    Console(width=120).print(table)


def run_trial(stream: TaskStream, search: Mapping[str, Any], options: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The figures of one run; `MEASURES` where the updates have low rank."""
    training = Training(seed=search["seed"], evaluate_on=search.get("evaluate_on", "test"))
    method = make_method(search["method"], **options)
    with tempfile.TemporaryDirectory() as folder:
        record = ContinualRunner(stream, method, folder, training=training, device=device).run()
        measures = {} if search["method"] in ("gpm", "joint") else update_measures(folder)
    seconds = sum(t.get("train", 0) + t.get("prepare", 0) + t.get("finish", 0) for t in record.timings)
    figures = {figure: round(record.metrics[figure], 2) for figure in KEPT}
    capacity = record.capacity[-1]
    return {"options": options, **figures, "seconds": round(seconds, 1), "capacity": capacity, "updates": measures}


def update_measures(folder: str) -> dict[str, float]:
    """Means of `MEASURES` over the layers and tasks of a run."""
    table = spectrum_table(AdapterSet.load(folder), zeros="omit")
    means = table[table["update"] == "task"].groupby("metric")["value"].mean()
    return {measure: round(float(means[measure]), 4) for measure in MEASURES}


if __name__ == "__main__":
    main()
