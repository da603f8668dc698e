"""The searches and the study on lm-four: all searches side by side, then the cells of ``lm-four.toml``.

    python benchmarks/lm_four.py --device cuda --processes 6
    python benchmarks/lm_four.py --device cpu --processes 2      # hours

Whatever is finished is kept: the same command goes on from there, and ``--seconds`` ends it in time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from manifold_cl.study import Study, read_plan

HERE = Path(__file__).parent
METHODS = ("eblora", "restricted", "keeplora", "balanced", "lora_muon", "sequential_merge")
"""Slowest first, so that all end together."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    if not search(options, end):
        print("the searches are not complete: the same command goes on", file=sys.stderr)
        return 1
    plan = replace(
        read_plan(HERE / "lm-four.toml"),
        device=options.device,
        processes=options.processes,
        threads=options.threads,
    )
    failures = Study(plan, HERE / "results" / "lm-four").run(
        on_event=lambda event: None if event.kind == "progress" else print(event.kind, event.cell.name, event.message)
    )
    for failure in failures:
        print(f"failed: {failure.cell.name}: {failure.reason}", file=sys.stderr)
    return 1 if failures else 0


def search(options: argparse.Namespace, end: float) -> bool:
    """Run the searches, ``processes`` at a time; whether all of them are complete."""
    waiting, running, failed = list(METHODS), [], False
    while waiting or running:
        while waiting and len(running) < options.processes:
            running.append(start(waiting.pop(0), options))
        time.sleep(0.5)
        failed |= any(process.poll() for process in running)
        running = [process for process in running if process.poll() is None]
        if time.monotonic() > end:
            for process in running:
                process.kill()
            return False
    return not failed


def start(method: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [str(HERE / "tune.py"), f"lm-four/{method}", "--device", options.device]
    return subprocess.Popen(
        [sys.executable, *command, "--threads", str(options.threads)],
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )


if __name__ == "__main__":
    sys.exit(main())
