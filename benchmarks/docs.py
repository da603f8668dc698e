"""Times of the documentation: a complete build of the site with every tutorial.

``python benchmarks/docs.py --threads 2`` writes ``benchmarks/results/docs.json``, from which ``make docs`` estimates
the time left. It removes the built site first. Other work on the machine adds much to the seconds and less to the CPU
seconds, which include child processes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = DOCS / "_build" / "html"
RESULT = ROOT / "benchmarks" / "results" / "docs.json"


def main() -> None:
    """Build, print a table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    threads = parser.parse_args().threads
    load = os.getloadavg()[0]
    for folder in (DOCS / "_build", DOCS / "tutorials"):
        shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(DOCS), str(SITE)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    times = json.loads((SITE / "build-times.json").read_text())
    for name, row in (*times["tutorials"].items(), ("site, in all", times["site"])):
        print(f"{name:38}{row['seconds']:8.1f} s{row['cpu_seconds']:8.1f} s of CPU")
    content = {
        "what": "Times of a complete build of the site, and of each tutorial in it; CPU seconds include children.",
        "threads": threads,
        "load_before": round(load, 1),
        **times,
        "machine": machine(),
        "libraries": library_versions(),
    }
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
