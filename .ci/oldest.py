"""The fast suite on the oldest versions that the project file allows, in an environment of its own.

    python .ci/oldest.py                       # installs into build/oldest, then runs all fast tests
    python .ci/oldest.py tests/geometry -x     # arguments of pytest instead

Every lower bound of the dependencies and of the extras below becomes an exact version. Tests of other extras skip, with
their reason. On Linux the oldest torch comes with the libraries for NVIDIA GPUs, several GB.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "oldest"
EXTRAS = ("peft", "hf", "bench", "pymanopt", "parquet", "hub", "llm")
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "beartype")
FAST = [
    "-n",
    "auto",
    "--maxprocesses",
    "4",
    "--dist",
    "loadfile",
    "-m",
    "not slow and not cuda and not reliability and not long",
]
OLD_BESIDE_NEW = ("ignore::DeprecationWarning", "ignore:There is a performance drop:UserWarning")
"""Warnings, errors elsewhere: of old libraries that call newer ones, and of operations that old torch maps slowly."""


def bounds() -> dict[str, str]:
    """Distribution → its lower bound: the highest one, where several extras have one, since all are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for name in EXTRAS for r in project["optional-dependencies"][name]]
    found: dict[str, str] = {}
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        lower = re.findall(r">=\s*([\d.]+)", requirement)
        if name is None or len(lower) != 1:
            raise SystemExit(f"{len(lower)} lower bounds in {requirement!r}, one is needed")
        found[name[0]] = max(found.get(name[0], "0"), lower[0], key=_numbers)
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def main() -> int:
    """Install once, then run pytest; its exit code."""
    if {"-h", "--help"} & {*sys.argv[1:]}:  # before gigabytes are installed
        print(__doc__)
        return 0
    python, pins = str(FOLDER / "venv" / "bin" / "python"), FOLDER / "constraints.txt"
    text = "".join(f"{name}=={version}\n" for name, version in bounds().items())
    if not pins.exists() or pins.read_text() != text:
        venv.create(FOLDER / "venv", with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, f"torch=={bounds()['torch']}"], check=True)
        pins.with_suffix(".new").write_text(text)
        subprocess.run(
            [*install, "-c", str(pins.with_suffix(".new")), "-e", f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS], check=True
        )
        pins.with_suffix(".new").rename(pins)
    arguments = sys.argv[1:] or FAST
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    allowed = [option for warning in OLD_BESIDE_NEW for option in ("-W", warning)]
    command = [python, "-m", "pytest", "-q", *allowed, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
