"""The main job, timed from outside: both methods on a stream, wall time, memory and figures, for several seeds.

    python benchmarks/stream.py --seeds 0 1 2
    python benchmarks/stream.py --quick

Each seed is one process of ``manifold-cl run`` in a fresh folder.
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
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.continual.record import RunRecord
from manifold_cl.files import write_json

RESULTS = Path(__file__).parent / "results"
FIGURES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="text-three")
    parser.add_argument("--stream", help="name, or file.py:function (default: text-six)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/stream-NAME.json)")
    options = parser.parse_args()
    stream = options.stream or ("text-three" if options.quick else "text-six")
    out = options.out or RESULTS / f"stream-{stream}.json"
    runs = []
    for seed in options.seeds:
        runs.append(one_run(stream, seed, options.device))
        report(stream, runs, options.device, out)  # after every seed: nothing is lost when the next is interrupted


def report(stream: str, runs: list[dict], device: str, out: Path) -> None:
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
            "versions": library_versions(),
            "machine": machine(),
        },
    )


def one_run(stream: str, seed: int, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "manifold_cl.cli", "run", "--stream", stream),
                *("--seed", str(seed), "--device", device, "--out", folder),
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
    main()
