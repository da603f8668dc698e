"""Times of the documentation: a complete build of the site, and each tutorial as a script of its own.

``python benchmarks/docs.py --threads 2`` writes ``benchmarks/results/docs.json``, from which ``make docs`` estimates
the time left. It removes the built site first. Other work on the machine adds to the seconds and much less to the CPU
seconds, which include child processes.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULT = ROOT / "benchmarks" / "results" / "docs.json"


def timed(*command: str, threads: int) -> dict[str, float]:
    """Wall-clock and CPU seconds of a command, children included."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def build(threads: int) -> tuple[dict[str, float], dict[str, float]]:
    """The times of a complete build, and the seconds per tutorial in it."""
    site = DOCS / "_build" / "html"
    for folder in (DOCS / "_build", DOCS / "tutorials"):
        shutil.rmtree(folder, ignore_errors=True)
    times = timed(sys.executable, "-m", "sphinx", "-q", "-b", "html", str(DOCS), str(site), threads=threads)
    return times, json.loads((site / "build-times.json").read_text())["tutorials"]


def main() -> None:
    """Measure, print a table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    threads = parser.parse_args().threads
    load = os.getloadavg()[0]
    site, in_build = build(threads)
    tutorials: dict[str, Any] = {}
    print(f"{'':38}{'alone':>8}{'CPU':>8}{'in build':>10}  seconds")
    for path in sorted((DOCS / "gallery").glob("plot_*.py")):
        alone = timed(sys.executable, "-W", "ignore", str(path), threads=threads)
        tutorials[path.stem] = {**alone, "in_build_seconds": round(in_build[path.stem], 1)}
        print(f"{path.stem:38}{alone['seconds']:8.1f}{alone['cpu_seconds']:8.1f}{in_build[path.stem]:10.1f}")
    print(f"{'site':38}{site['seconds']:8.1f}{site['cpu_seconds']:8.1f}")
    content = {
        "what": "Times of a complete build of the site and of each tutorial as a script, in seconds.",
        "threads": threads,
        "load_before": round(load, 1),
        "site": site,
        "tutorials": tutorials,
        "machine": machine(),
        "libraries": library_versions(),
    }
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
