"""Change one option of `eblora` at a time, and show what a wrong value looks like: losses, scores, sizes, capacity.

    python benchmarks/one_change.py --threads 1

Runs on the validation parts of ``text-three``, a small stream, with one seed. It shows symptoms (docs/choosing.md); no
default follows from it. Finished trials are kept, so an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from analysis import AdapterSet, spectrum_table
from manifold_cl.continual import ContinualRunner, Training, make_method
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream

RESULT = Path(__file__).parent / "results" / "one-change.json"
STREAM, SEED = "text-three", 100
TRIALS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("eblora", {}),
    ("eblora", {"lr": 6e-4}),
    ("eblora", {"lr": 6e-2}),
    ("eblora", {"scale_lr": 2e-3}),
    ("eblora", {"scale_lr": 2e-1}),
    ("eblora", {"initial_scale": -0.005}),
    ("eblora", {"initial_scale": -0.5}),
    ("eblora", {"rank": 4, "alpha": 8.0}),  # alpha / rank stays 2, so that only the rank changes
    ("eblora", {"rank": 32, "alpha": 64.0}),
    ("eblora", {"energy": 0.9}),
    ("eblora", {"energy": 0.99}),
    ("eblora", {"rank": 8, "alpha": 16.0}),
    ("sequential_merge", {}),
    ("sequential_merge", {"lr": 5e-4}),
)
ENDS = 5
"""Steps over which the first and the last training losses of a task are averaged: one batch is too noisy."""


def main() -> None:
    """Run the trials that have no result yet, and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    done = json.loads(RESULT.read_text())["trials"] if RESULT.exists() else []
    stream = open_stream(STREAM)
    for method, options in TRIALS:
        if any((trial["method"], trial["options"]) == (method, options) for trial in done):
            continue
        done.append(measure(stream, method, options))
        print(done[-1], flush=True)
        content = {"stream": STREAM, "evaluate_on": "validation", "seed": SEED, "trials": done}
        write_json(RESULT, {**content, "versions": library_versions(), "machine": machine()})


def measure(stream: Any, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run; lists have one entry per task."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training(seed=SEED, evaluate_on="validation")
        try:
            record = ContinualRunner(stream, make_method(method, **options), folder, training=training).run()
        except ValueError as error:  # a run that diverges stops with a message
            return {"method": method, "options": options, "stopped": str(error)}
        table = spectrum_table(AdapterSet.load(folder))
    sizes = table[(table["metric"] == "spectral_norm") & (table["update"] == "task")]
    return {
        "method": method,
        "options": options,
        **{figure: round(record.metrics[figure], 2) for figure in ("mft", "mfn", "bwt", "zero_shot")},
        "first_loss": [round(fmean(losses[:ENDS]), 3) for losses in record.losses],
        "last_loss": [round(fmean(losses[-ENDS:]), 3) for losses in record.losses],
        "largest_singular_value": [round(float(sizes[sizes["task"] == t]["value"].mean()), 4) for t in record.tasks],
        "capacity": record.capacity,
        "seconds": round(sum(t["prepare"] + t["train"] + t["finish"] for t in record.timings), 1),
    }


if __name__ == "__main__":
    main()
