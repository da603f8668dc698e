"""Start times: ``import torch`` beside ``import manifold_cl``, ``import analysis`` and the help of the command.

    python benchmarks/bench_start.py

Each lap starts every process once, in turn, so that a change of the machine's speed affects all of them. The numbers
are medians over laps; a ratio is the median of the ratios of single laps. CPU time is user and system time of the
process, since other work may share the machine. A first lap, not counted, fills the file cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

RESULT = Path(__file__).parent / "results" / "start.json"
STARTS = {
    "import torch": ("-c", "import torch"),
    "import manifold_cl": ("-c", "import manifold_cl"),
    "import manifold_cl, every name": ("-c", "from manifold_cl import *"),
    "import analysis": ("-c", "import analysis"),
    "import analysis, every name": ("-c", "from analysis import *"),
    "manifold-cl --help": ("-m", "manifold_cl", "--help"),
    "manifold-cl run --help": ("-m", "manifold_cl", "run", "--help"),
}
AIMS = (
    ("import manifold_cl over import torch, CPU time", "import manifold_cl", "cpu_over_torch", 1.3),
    ("manifold-cl --help, CPU seconds", "manifold-cl --help", "cpu_seconds", 1.0),
    ("manifold-cl run --help, CPU seconds", "manifold-cl run --help", "cpu_seconds", 1.0),
)
"""Wall seconds equal CPU seconds where no other work shares the machine."""


def measure(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Wall and CPU seconds of one Python process."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    laps = [{name: measure(arguments) for name, arguments in STARTS.items()} for _ in range(options.laps + 1)][1:]
    rows = {
        name: {
            "wall_seconds": round(median(lap[name][0] for lap in laps), 3),
            "cpu_seconds": round(median(lap[name][1] for lap in laps), 3),
            "cpu_over_torch": round(median(lap[name][1] / lap["import torch"][1] for lap in laps), 3),
        }
        for name in STARTS
    }
    aims = [
        {"aim": f"{aim}: at most {limit}", "measured": rows[name][number], "met": rows[name][number] <= limit}
        for aim, name, number, limit in AIMS
    ]
    load = os.getloadavg()[0]
    content = {"rows": rows, "aims": aims, "laps": options.laps, "load_average": round(load, 1)}
    write_json(options.out, {**content, "versions": library_versions(), "machine": machine()})
    table = Table("start", "wall s", "CPU s", "CPU over import torch")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    console = Console()
    console.print(table)
    for aim in aims:
        console.print(f"{'met' if aim['met'] else 'missed'}: {aim['aim']}, measured {aim['measured']}")


if __name__ == "__main__":
    main()
