"""CPU time of the tests per file and phase, as a pytest plugin and a script.

CPU time varies less than wall time on a machine with other work. It counts the process and the children that it waited
for. Collection (a file's imports), set-up (its fixtures) and calls are added up per file. Files that a call does not
collect keep their entry, so that one call per folder gives the times of the complete suite. All tests run in this
process: workers of pytest-xdist are not measured, so that -n is refused.

    python benchmarks/suite_times.py -m "not slow and not cuda" tests/optim  # measure, with any options of pytest
    python benchmarks/suite_times.py                                         # print what has been measured
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

RESULT = Path(__file__).parent / "results" / "suite-times.json"
NOTED = 0.5  # seconds from which a test is named
PHASES = ("collect", "setup", "call", "teardown")


def processor_seconds() -> float:
    """CPU seconds of this process, and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class SuiteTimes:
    """Adds up CPU seconds per file and phase."""

    def __init__(self) -> None:
        self.last = processor_seconds()
        self.files: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
        self.tests: dict[str, float] = defaultdict(float)

    def elapsed(self) -> float:
        """CPU seconds since the last call."""
        now = processor_seconds()
        seconds, self.last = now - self.last, now
        return seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        """Count the imports of a file."""
        self.elapsed()
        report = yield
        if isinstance(collector, pytest.Module):
            self.files[collector.nodeid]["collect"] += self.elapsed()
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        """Begin to count at a test's set-up."""
        self.elapsed()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        """Put the seconds of a phase into its report."""
        report = yield
        report.processor_seconds = self.elapsed()
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add up the seconds of a report."""
        seconds = getattr(report, "processor_seconds", 0.0)
        self.files[report.nodeid.partition("::")[0]][report.when] += seconds
        self.tests[report.nodeid] += seconds


def measure(arguments: Sequence[str]) -> int:
    """Runs pytest, and puts the times of the files that ran into the result."""
    plugin = SuiteTimes()
    code = int(pytest.main(["-q", *arguments], plugins=[plugin]))
    part = "slow" if any(argument.startswith("slow") for argument in arguments) else "fast"
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept = [name for name in known.get(part, {}) if Path(name).exists() and name not in plugin.files]
    files = {name: known[part][name] for name in kept}
    known[part] = files
    tests: dict[str, dict[str, float]] = defaultdict(dict)
    for test, seconds in plugin.tests.items():
        name, _, inside = test.partition("::")
        tests[name][inside] = round(seconds, 2)
    for name, each in tests.items():
        phases = {phase: round(value, 2) for phase, value in plugin.files[name].items()}
        longest = sorted((test for test in each if each[test] >= NOTED), key=each.__getitem__, reverse=True)
        files[name] = {"tests": len(each), **phases, "longest": {test: each[test] for test in longest}}
    RESULT.write_text(
        json.dumps({key: dict(sorted(each.items())) for key, each in sorted(known.items())}, indent=1) + "\n"
    )
    return code


def show(limit: int) -> None:
    """Prints CPU seconds per folder, and the files that take the most."""
    for part, files in json.loads(RESULT.read_text()).items():
        folders: dict[str, list[float]] = defaultdict(lambda: [0.0] * (len(PHASES) + 1))
        for name, entry in files.items():
            for key in (str(Path(name).parent), "total"):
                for index, column in enumerate(("tests", *PHASES)):
                    folders[key][index] += entry[column]
        print(f"{part:36}{'tests':>8}" + "".join(f"{phase:>10}" for phase in PHASES))
        for name, row in sorted(folders.items(), key=lambda each: -sum(each[1][1:])):
            print(f"{name:36}{row[0]:8.0f}" + "".join(f"{value:10.1f}" for value in row[1:]))
        total = {name: sum(entry[phase] for phase in PHASES) for name, entry in files.items()}
        longest = {f"{name}::{test}": each for name in files for test, each in files[name]["longest"].items()}
        for seconds in (total, longest):
            print()
            for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:limit]:
                print(f"{seconds[name]:8.1f} s  {name}")


def main() -> int:
    """Measures where arguments of pytest are given, and prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=int, default=30, metavar="NUMBER", help="files and tests to print (default 30)")
    options, arguments = parser.parse_known_args()
    if any(argument.startswith(("-n", "--numprocesses")) and argument != "-n0" for argument in arguments):
        parser.error("workers of pytest-xdist are not measured: leave out -n")
    code = measure(arguments) if arguments else 0
    show(options.show)
    return code


if __name__ == "__main__":
    sys.exit(main())
