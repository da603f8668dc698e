"""Run the hyper-parameter search of one method on the validation stream, trial by trial, resumable.

    python benchmarks/tune.py sequential --threads 1

Trials are listed in ``benchmarks/search/<method>.json``, every method with the same number; results go to
``benchmarks/results/tuning-<method>.json``. The winner is the trial with the highest final accuracy (MFN). The
reported stream is never touched here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from manifold_cl.adapters.files import write_json
from manifold_cl.continual import ContinualRunner, Training, make_method
from manifold_cl.continual.record import library_versions, machine
from manifold_cl.streams import open_stream

HERE = Path(__file__).parent
KEPT = ("mft", "mfn", "maa", "bwt", "fwt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    search = json.loads((HERE / "search" / f"{options.method}.json").read_text())
    path = HERE / "results" / f"tuning-{options.method}.json"
    done = json.loads(path.read_text())["trials"] if path.exists() else []
    stream = open_stream(search["stream"])
    training = Training(seed=search["seed"])
    for trial in search["trials"]:
        if any(result["options"] == trial for result in done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            method = make_method(options.method, **trial)
            record = ContinualRunner(stream, method, folder, training=training).run()
        seconds = sum(t.get("train", 0) + t.get("prepare", 0) + t.get("finish", 0) for t in record.timings)
        result = {name: round(record.metrics[name], 2) for name in KEPT}
        done.append({"options": trial, **result, "seconds": round(seconds, 1), "capacity": record.capacity[-1]})
        print(done[-1], flush=True)
        content = {
            "stream": search["stream"],
            "seed": search["seed"],
            "criterion": "highest mfn",
            "winner": max(done, key=lambda r: r["mfn"])["options"],
            "trials": done,
            "versions": library_versions(),
            "machine": machine(),
        }
        write_json(path, content)

    table = Table(title=f"{options.method} on {search['stream']}, seed {search['seed']}")
    for column in ("options", *KEPT):
        table.add_column(column, justify="left" if column == "options" else "right")
    for result in sorted(done, key=lambda r: -r["mfn"]):
        said = ", ".join(f"{k}={v}" for k, v in result["options"].items())
        table.add_row(said, *(f"{result[name]:.2f}" for name in KEPT))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
