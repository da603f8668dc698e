"""Everything that needs a GPU, in one call of at most nine minutes: the tests marked ``cuda``, then each benchmark.

    python benchmarks/gpu.py [--out benchmarks/results/gpu] [--only step llava]
    python benchmarks/gpu.py --dry          # every job at tiny sizes on the CPU: does each one run to its end?

Needs torch with CUDA, this package's own dependencies and pytest. Every job runs in a process of its own with a time
limit, those that matter most first. ``summary.json`` under ``--out`` is written before and after each of them, and long
jobs write their own JSON as they go. A job that passes its limit is ended with all its processes. A job whose data are
missing is named with the reason. Exit code 0 when no job failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
BUDGET = 520
"""Seconds for all jobs together."""
DRY_SLACK = 5
"""How many times a job's limit it may take in a dry run: a slow or busy CPU is no fault of a job."""


@dataclass(frozen=True)
class Job:
    """A command on the GPU, its form at tiny sizes on the CPU, seconds it may take, and why it cannot run here.

    ``{out}`` in a command is the file for its JSON.
    """

    command: list[str]
    dry: list[str]
    limit: int
    missing: Callable[[], str | None] = lambda: None


def script(name: str, *options: str) -> list[str]:
    return [str(HERE / name), *options, "--out", "{out}"]


def marked_tests() -> list[str]:
    """Test files with tests for a GPU: the others' imports are no business of this machine."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "pytest.mark.cuda" in path.read_text(encoding="utf-8")]


def missing_archives() -> str | None:
    """Why the embedded stream cannot run: there may be no network here."""
    os.environ["PIP_NO_INDEX"] = "1"
    try:
        from manifold_cl.streams import open_stream

        open_stream("text-six").make_model()
    except Exception as error:  # whatever it is, it is named in the summary
        return f"text-six cannot be opened: {str(error).splitlines()[0]}"
    return None


JOBS: dict[str, Job] = {
    "tests": Job(
        ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "cuda", *marked_tests()],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "--collect-only", *marked_tests()],
        120,
    ),
    "step": Job(
        script("bench_step.py", "--device", "cuda", "--full", "--no-job", "--laps", "9"),
        script(
            *("bench_step.py", "--device", "cpu", "--blocks", "1", "--width", "128", "--laps", "1", "--no-job"),
            "--replay",
        ),
        100,
    ),
    "llava": Job(
        script("bench_llava.py", "--device", "cuda"),
        script("bench_llava.py", "--device", "cpu", "--width", "128", "--pairs", "1", "--steps", "1"),
        120,
    ),
    "plan": Job(script("plan_gpu.py", "--device", "cuda"), script("plan_gpu.py", "--device", "cpu"), 110),
    "stream": Job(
        script(
            *("stream.py", "--device", "cuda", "--methods", "eblora"),
            *("--beside", str(HERE / "results" / "stream-text-six.json")),
        ),
        script("stream.py", "--device", "cpu", "--stream", "tests/toy.py:toy_stream", "--methods", "eblora"),
        150,
        missing_archives,
    ),
    "bf16": Job(
        script("bf16_training.py", "--device", "cuda"),
        script("bf16_training.py", "--device", "cpu", "--width", "64", "--blocks", "1", "--steps", "4"),
        60,
    ),
    "layer": Job(
        script("bench_layer.py", "--device", "cuda", "--model-shaped"),
        script(
            *("bench_layer.py", "--device", "cpu", "--model-shaped", "--width", "128", "--blocks", "1"),
            *("--repeats", "1", "--tokens", "16"),
        ),
        120,
    ),
    "analysis": Job(
        script("bench_analysis.py", "--device", "cuda"),
        script(
            *("bench_analysis.py", "--device", "cpu", "--width", "128", "--blocks", "1", "--tasks", "2", "--laps", "1"),
        ),
        120,
    ),
    "subspace": Job(
        script("bench_subspace.py", "--device", "cuda"),
        script(
            *("bench_subspace.py", "--device", "cpu", "--shape", "96", "64", "--tokens", "128", "--size", "32"),
            *("--width", "128", "--laps", "1", "--part", "layer", "pass"),
        ),
        80,
    ),
    "retractions": Job(
        script("bench_retractions.py", "--device", "cuda"),
        script("bench_retractions.py", "--batch", "2", "--shape", "64", "4", "--dense", "64", "--laps", "1"),
        60,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/gpu; --dry: a temporary one)")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS), metavar="JOB")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all jobs together")
    parser.add_argument("--dry", action="store_true", help="each job at tiny sizes on the CPU")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("no CUDA device here; --dry runs every job at tiny sizes on the CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        out = options.out or (Path(place) if options.dry else HERE / "results" / "gpu")
        out.mkdir(parents=True, exist_ok=True)
        return run_all(options.only, out, dry=options.dry, end=time.monotonic() + options.budget)


def run_all(names: list[str], out: Path, *, dry: bool, end: float) -> int:
    """Runs the jobs in turn and keeps the summary up to date; 0 when none of them failed."""
    jobs: dict[str, dict[str, object]] = {}
    summary = {"device": device_name(dry), "torch": torch.__version__, "dry": dry, "jobs": jobs}
    for name in names:
        job = JOBS[name]
        left = int(end - time.monotonic())
        reason = "no time left" if left < 10 else None if dry else job.missing()
        if reason:
            jobs[name] = {"left_out": reason}
            print(f"== {name}: left out: {reason}", flush=True)
        else:
            jobs[name] = {"running": True}
            save(summary, out)
            jobs[name] = run(name, job, out, dry=dry, limit=min(job.limit * (DRY_SLACK if dry else 1), left))
        save(summary, out)
    return 1 if any(job.get("exit_code") for job in jobs.values()) else 0


def save(summary: dict[str, object], out: Path) -> None:
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def run(name: str, job: Job, out: Path, *, dry: bool, limit: int) -> dict[str, object]:
    """What the summary says of one job; its output lies in a file beside."""
    command = [part.format(out=out / f"{name}.json") for part in (job.dry if dry else job.command)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    with (out / f"{name}.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            end_group(process)
        seconds = round(time.perf_counter() - start, 1)
        log.seek(0)
        printed = log.read()
    print(f"== {name}: {'ok' if code == 0 else f'FAILED ({code})'}, {seconds} s\n{printed[-3000:]}", flush=True)
    shown = [part.replace(str(ROOT) + os.sep, "") for part in (job.dry if dry else job.command)]
    return {"command": shown, "exit_code": code, "seconds": seconds}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a job and the processes that it started; nothing where they have ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def device_name(dry: bool) -> str:
    return platform.processor() or platform.machine() if dry else torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
