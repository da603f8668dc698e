"""The main job, timed from outside: both methods on a stream, wall time, memory and figures, for several seeds.

    python benchmarks/stream.py --seeds 0 1 2
    python benchmarks/stream.py --quick
    python benchmarks/stream.py --device cuda --methods eblora --beside benchmarks/results/stream-text-six.json

Each seed is one process of ``manifold-cl run`` in a fresh folder. With ``--beside``, accuracies are compared with those
of another file, such as the CPU's; exit code 1 where they differ by more than noise.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.continual.record import RunRecord
from manifold_cl.files import write_json

RESULTS = Path(__file__).parent / "results"
EXAMPLES = 200
"""Test examples per task of text-six, by which accuracies are multiples of half a point."""
FIGURES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="text-three")
    parser.add_argument("--stream", help="name, or file.py:function (default: text-six)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=[], help="default: those of manifold-cl run")
    parser.add_argument("--beside", type=Path, help="results of the same seeds, to compare accuracies with")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/stream-NAME.json)")
    options = parser.parse_args()
    stream = options.stream or ("text-three" if options.quick else "text-six")
    out = options.out or RESULTS / f"stream-{stream}.json"
    reference = json.loads(options.beside.read_text(encoding="utf-8"))["runs"] if options.beside else []
    runs: list[dict] = []
    for seed in options.seeds:
        runs.append(one_run(stream, seed, options.device, options.methods))
        report(
            stream, runs, options.device, out, compared(runs, reference)
        )  # after every seed: nothing is lost when the next is interrupted
    differences = compared(runs, reference)
    for row in differences:
        print(json.dumps(row))
    if options.beside and not differences:
        print(f"{options.beside} has no run of these seeds and methods")
        return 1
    return 0 if all(row["within_noise"] for row in differences) else 1


def compared(runs: list[dict], reference: list[dict]) -> list[dict]:
    """Differences of accuracies, in points, from the runs of the same seed and method in ``reference``.

    Noise of a mean final accuracy: two standard errors over the test examples of the difference of two independent
    runs, ``2 √(2 Σ a(1 − a) / N) / T``. The runs share their examples, so that it is rather too wide.
    """
    known = {run["seed"]: run["methods"] for run in reference}
    rows = []
    for run in runs:
        for name, method in run["methods"].items():
            if name not in known.get(run["seed"], {}):
                continue
            here, there = (np.array(each["accuracy"]) for each in (method, known[run["seed"]][name]))
            share = there[-1] / 100
            noise = 100 * 2 * float(np.sqrt(2 * (share * (1 - share)).sum() / EXAMPLES)) / len(share)
            difference = float(here[-1].mean() - there[-1].mean())
            largest = float(np.abs(here - there).max())
            row = {
                "seed": run["seed"],
                "method": name,
                "mfn_difference": round(difference, 3),
                "noise": round(noise, 3),
            }
            rows.append({**row, "largest_difference": round(largest, 3), "within_noise": abs(difference) <= noise})
    return rows


def report(stream: str, runs: list[dict], device: str, out: Path, differences: list[dict]) -> None:
    methods = list(runs[0]["methods"])
    means = {
        method: {name: statistics.mean(run["methods"][method]["metrics"][name] for run in runs) for name in FIGURES}
        for method in methods
    }
    table = Table(title=f"{stream}: mean over seeds {', '.join(str(run['seed']) for run in runs)}")
    for column in ("method", *FIGURES):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        table.add_row(method, *(f"{means[method][name]:.1f}" for name in FIGURES))
    Console().print(table)
    write_json(
        out,
        {
            "what": f"manifold-cl run --stream {stream}, one process a seed, methods one after the other",
            "device": device,
            "means": means,
            "runs": runs,
            **({"beside": differences} if differences else {}),
            "versions": library_versions(),
            "machine": machine(),
        },
    )


def one_run(stream: str, seed: int, device: str, methods: Sequence[str] = ()) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "manifold_cl.cli", "run", "--stream", stream),
                *("--seed", str(seed), "--device", device, "--out", folder),
                *(part for method in methods for part in ("--method", method)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        wall = time.perf_counter() - start
        records = [RunRecord.load(path.parent) for path in sorted(Path(folder).glob("*/record.json"))]
    result = {
        "seed": seed,
        "wall_seconds": round(wall, 1),
        # The largest child of this process so far: exact for the first run, an upper bound for later ones.
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3),
        "methods": {
            r.method: {
                "metrics": {name: round(value, 3) for name, value in r.metrics.items()},
                "accuracy": r.matrix().tolist(),
                "seconds": {
                    phase: round(sum(t.get(phase, 0.0) for t in r.timings), 1)
                    for phase in ("prepare", "train", "finish", "evaluate")
                },
                "optimizer_share": round(statistics.mean(t["optimizer"] for t in r.timings), 4),
                "worst_constraint": max((e for errors in r.constraints for e in errors.values()), default=None),
            }
            for r in sorted(records, key=lambda r: r.method, reverse=True)
        },
    }
    print(json.dumps({k: v for k, v in result.items() if k != "methods"}), flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
