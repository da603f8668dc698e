"""Everything that needs a GPU, in one call: the tests marked ``cuda``, then each benchmark on the device.

    python benchmarks/gpu.py [--out benchmarks/results/gpu]

Needs torch with CUDA, this package's own dependencies and pytest. Every job runs in a process of its own, so that one
that fails or runs out of time leaves the others their turn; what they printed and wrote lies under ``--out``, with
``summary.json`` over all. Exit code 0 when every job succeeded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
JOBS: dict[str, list[str]] = {
    "tests": ["-m", "pytest", "-q", "-m", "cuda", str(HERE.parent / "tests")],
    "retractions": [str(HERE / "bench_retractions.py"), "--device", "cuda"],
    "step": [str(HERE / "bench_step.py"), "--device", "cuda", "--full"],
    "layer": [str(HERE / "bench_layer.py"), "--device", "cuda", "--model-shaped"],
    "llava": [str(HERE / "bench_llava.py"), "--device", "cuda"],
    "analysis": [str(HERE / "bench_analysis.py"), "--device", "cuda"],
}
LIMIT = 150
"""Seconds a job."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--only", nargs="+", choices=sorted(JOBS), default=list(JOBS))
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds a job")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for name in options.only:
        command = [sys.executable, *JOBS[name]]
        if name != "tests":
            command += ["--out", str(options.out / f"{name}.json")]
        start = time.perf_counter()
        code, said = run(command, options.limit)
        seconds = round(time.perf_counter() - start, 1)
        (options.out / f"{name}.log").write_text(said, encoding="utf-8")
        print(f"== {name}: {'ok' if code == 0 else f'FAILED ({code})'}, {seconds} s\n{said[-3000:]}", flush=True)
        jobs[name] = {"command": command[1:], "exit_code": code, "seconds": seconds}
    summary = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "jobs": jobs}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0 if all(job["exit_code"] == 0 for job in jobs.values()) else 1


def run(command: list[str], limit: int) -> tuple[int, str]:
    """Exit code, 124 past the limit, and everything the command printed."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit, cwd=HERE.parent
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return 124, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
