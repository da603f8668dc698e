"""Seconds of `manifold-cl analyze` on two adapters of a 7B model, from start to end.

    python benchmarks/analyze_command.py [--folder FOLDER]

Two PEFT folders with the shapes of LLaVA-1.5-7B's 224 linear layers, rank 16, float32 factors. The command runs in a
process of its own: imports, tables, figures and the report are included, and files are in the page cache. The fastest
lap is the result, since other programs only make laps slower. Seconds of the processor are listed beside the seconds
of the clock: on a busy machine only the former say anything.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_analysis import write_adapters
from rich.console import Console
from rich.table import Table

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

AIM = "under 6 s on two idle CPU cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps the adapters here, and uses those that are here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "analyze-command.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "adapters"
        if not folder.exists():
            write_adapters(folder, options)
        adapters = sorted(folder.glob("0*"))
        laps = [lap(adapters, Path(temporary) / "report", options.threads) for _ in range(options.laps + 1)][1:]
    result = {
        "what": f"{options.tasks} adapters of {7 * options.blocks} layers, rank {options.rank}; one process per lap, "
        "the first lap is left out",
        "seconds": min(row["seconds"] for row in laps),
        "processor_seconds": min(row["processor_seconds"] for row in laps),
        "laps": laps,
        "threads": options.threads,
        "aim": AIM,
        "versions": library_versions(),
        "machine": machine(),
    }
    table = Table(title=f"{options.threads} threads")
    for column in ("lap", "seconds", "of the processor", "load"):
        table.add_column(column)
    for number, row in enumerate(laps, start=1):
        table.add_row(str(number), *(f"{row[key]:.2f}" for key in ("seconds", "processor_seconds", "load")))
    Console().print(table)
    write_json(options.out, result)


def lap(adapters: list[Path], out: Path, threads: int) -> dict[str, Any]:
    """Seconds of one run of the command, and the load of the machine before it."""
    code = "from manifold_cl.cli import main; main()"
    command = [sys.executable, "-c", code, "analyze", *map(str, adapters), "--out", str(out)]
    load, before, start = os.getloadavg()[0], children(), time.perf_counter()
    # a waiting thread does not spin: its seconds would count as work on a busy machine
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(children() - before, 2),
        "load": round(load, 2),
    }


def children() -> float:
    """Seconds of the processor that finished child processes took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
