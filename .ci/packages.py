"""Builds wheel and sdist and reads them, then installs each extra alone in a fresh environment.

    python .ci/packages.py                  # the files, then core and all extras
    python .ci/packages.py --files          # the files only, in seconds
    python .ci/packages.py core peft        # these environments only
    python .ci/packages.py --newest core    # the newest versions that the ranges allow; torch stays pinned

An environment gets torch first, as the installation page says, then the wheel with one extra. It has to pass
`pip check`, import every public name, and run `manifold-cl info` and the jobs of that extra, in a folder outside the
clone. The last lines are a table of times and sizes. The exit code is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / ".ci" / "smoke"
HELPERS = (ROOT / "tests", ROOT / "tests" / "integrations")
"""Folders of the tiny models and tasks that jobs import."""
TOP = {"manifold_cl", "analysis"}
SHOW, STUDY = ("-m", "manifold_cl.cli", "info"), ("-m", "manifold_cl.cli", "study", "study.toml", "--out", "out")
JOBS: dict[str, list[Sequence[str]]] = {
    "core": [(str(SMOKE / "run.py"),), ("-m", "manifold_cl.cli", "analyze", "run", "--out", "report")],
    "peft": [(str(ROOT / "examples/peft_quickstart.py"),)],
    "pymanopt": [(str(SMOKE / "solve.py"),)],
    "hf": [(str(SMOKE / "train.py"), "transformers")],
    "lightning": [(str(SMOKE / "train.py"), "lightning")],
    "bench": [
        ("-m", "manifold_cl.cli", "run", "--quick", "--method", "zero_shot", "--examples", "16", "--out", "runs")
    ],
    "llm": [(str(SMOKE / "train.py"), "answers")],
    "vlm": [(str(ROOT / "examples/llava_continual.py"), "--tiny")],
    "parquet": [STUDY],
    "hub": [(str(SMOKE / "hub.py"),)],
    "ray": [(*STUDY, "--engine", "ray")],
}
"""Environment → arguments of Python, run one after the other in one folder."""
ABSENT = {"core": ("transformers", "peft", "pymanopt", "pyarrow", "ray"), "peft": ("pymanopt", "ray"), "hf": ("peft",)}
"""Environment → modules that nothing in it may install."""
STUDY_FILE = """
stream = "toy.py:toy_stream"
rank = 4
threads = 1
[training]
epochs = 1
[methods.eblora]
lr = 0.02
[methods.sequential_merge]
lr = 0.01
"""


class BrokenError(Exception):
    """A fault that a user would have too."""


@dataclass
class Result:
    """One environment: seconds to install and to run its jobs, and megabytes beside torch."""

    name: str
    install: float
    jobs: float
    size: float


def main() -> int:
    """Build, read, install and run; the exit code."""
    names = extras()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="environments (default: all)")
    parser.add_argument("--newest", action="store_true", help="without the pinned versions")
    parser.add_argument("--files", action="store_true", help="build and read the files, and install nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no environment of this name: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.files and (options.names or options.newest):
        parser.error("--files installs nothing: give it without names and without --newest")
    folder = ROOT / "build" / "packages"
    results, failures = [], []
    try:
        wheel = build(folder)
    except BrokenError as error:
        print(f"failed: {error}")
        return 1
    for name in () if options.files else options.names or names:
        try:
            results.append(environment(name, wheel, folder / name, newest=options.newest))
        except BrokenError as error:
            failures.append(name)
            print(f"{name}: failed: {error}", flush=True)
    if results:
        print(f"\n{'environment':14}{'install':>10}{'jobs':>10}{'beside torch':>16}")
    for each in results:
        print(f"{each.name:14}{each.install:8.0f} s{each.jobs:8.0f} s{each.size:13.0f} MB")
    if failures:
        print(f"failed: {', '.join(failures)}")
    return bool(failures)


def extras() -> list[str]:
    """The environments: one without extras, and one per extra for users."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = ["core", *(name for name in declared if name not in ("dev", "docs", "all"))]
    if differing := set(names) ^ set(JOBS):
        raise SystemExit(f"packages.py has no job for an extra, or one for none: {', '.join(sorted(differing))}")
    return names


def build(folder: Path) -> Path:
    """Build both archives, and return the wheel after its content and that of the sdist were compared with git."""
    for left in folder.glob("*.*"):
        if left.is_file():
            left.unlink()
    tools = folder / "tools"
    venv.create(tools, with_pip=True, clear=True)
    python = str(tools / "bin" / "python")
    run([python, "-m", "pip", "install", "-q", "hatchling", "-c", str(ROOT / "constraints.txt")])
    run([python, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    listed = tracked()
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if not name.endswith("/")]
    own = {name for name in files if ".dist-info/" not in name}
    if differing := own ^ set(listed):
        raise BrokenError(f"the wheel differs from git in {', '.join(sorted(differing)[:5])}")
    if missing := {"manifold_cl/py.typed", "analysis/py.typed"} - own:
        raise BrokenError(f"the wheel lacks {', '.join(missing)}")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    if missing := set(listed) - inside:
        raise BrokenError(f"the sdist lacks {', '.join(sorted(missing)[:5])}")
    print(f"{wheel.name}: {len(own)} files, {wheel.stat().st_size / 1e6:.1f} MB; {sdist.name}", flush=True)
    return wheel


def tracked() -> list[str]:
    """The files of both packages: those of git, or all of a folder that is no checkout."""
    try:
        return run(["git", "ls-files", *TOP], cwd=ROOT).splitlines()
    except (BrokenError, FileNotFoundError):
        print("no git here: the files are compared with those of the folder", flush=True)
    files = (path for top in TOP for path in (ROOT / top).rglob("*") if path.is_file())
    return [str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts]


def environment(name: str, wheel: Path, folder: Path, *, newest: bool) -> Result:
    """Make the environment and run what a user would."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)  # of a call that failed: its jobs would find their own results
    venv.create(folder / "venv", with_pip=True, clear=True)
    python = str(folder / "venv" / "bin" / "python")
    pinned = [] if newest else ["-c", str(ROOT / "constraints.txt")]
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    run([python, "-m", "pip", "install", "-q", torch.split()[0], *pinned])
    before = megabytes(folder / "venv")
    run([python, "-m", "pip", "install", "-q", f"{wheel}[{name}]" if name != "core" else str(wheel), *pinned])
    installed = time.monotonic() - start
    size = megabytes(folder / "venv") - before
    run([python, "-m", "pip", "check"])
    jobs = folder / "jobs"
    jobs.mkdir(exist_ok=True, parents=True)
    (jobs / "toy.py").write_bytes((ROOT / "tests" / "toy.py").read_bytes())
    (jobs / "study.toml").write_text(STUDY_FILE)
    start = time.monotonic()
    run([python, str(SMOKE / "names.py"), *ABSENT.get(name, ())], cwd=jobs)
    for job in (SHOW, *JOBS[name]):
        run([python, *job], cwd=jobs)
    result = Result(name, installed, time.monotonic() - start, size)
    shutil.rmtree(folder)
    return result


def megabytes(folder: Path) -> float:
    """The size of a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6


def run(command: Sequence[str], *, cwd: Path | None = None) -> str:
    """Standard output of a command; BrokenError with its last lines if it fails."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *map(str, HELPERS)]), "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = "\n    ".join((ended.stdout + ended.stderr).strip().splitlines()[-25:])
        raise BrokenError(f"{' '.join(command[1:])}: exit {ended.returncode}\n    {last}")
    return ended.stdout


if __name__ == "__main__":
    sys.exit(main())
