"""The counts of the reliability suite: what was tried, per kind of fault, summed over processes and written as JSON."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifold_cl.continual.environment import library_versions, machine

COUNT = "count"
"""Name of the property of a test: group, kind and number of what it tried."""

SECONDS = 5.0
"""Seconds between two writes of the counts."""
Tally = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--counts", metavar="FILE", help="write the counts of the reliability suite to a JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in a process of xdist
        config.pluginmanager.register(Counts(config.getoption("counts", None)), "reliability counts")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts what a test tries: ``tally("kills", "run of eblora")``; the properties travel with its report."""
    counts: Counter[tuple[str, str]] = Counter()

    def count(group: str, kind: str, number: int = 1) -> None:
        counts[group, kind] += number

    yield count
    for (group, kind), number in counts.items():
        request.node.user_properties.append((COUNT, (group, kind, number)))


class Counts:
    """Sums the counts of all tests, prints them, and writes them to a file as they come."""

    def __init__(self, path: str | None) -> None:
        self.path = None if path is None else Path(path)
        self.groups: dict[str, Counter[str]] = {}
        self.tests: Counter[str] = Counter()
        self.skipped: list[str] = []
        self.began = time.monotonic()
        self.written = self.began
        self.complete = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == COUNT:
                    group, kind, number = value
                    self.groups.setdefault(group, Counter())[kind] += number
        if report.failed or report.when == "call" or report.skipped:
            self.tests[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped.append(f"{report.nodeid}: {report.longrepr[2]}")
        if time.monotonic() - self.written > SECONDS:
            self.write()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        self.write()

    def write(self) -> None:
        """Write the counts so far, so that a run that is stopped loses none."""
        self.written = time.monotonic()
        if self.path is not None and self.groups:
            self.path.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.groups:
            return
        content = self.content()
        terminalreporter.section("reliability")
        for group, number in content["counts"].items():
            terminalreporter.write_line(f"{number:>6}  {group}")

    def content(self) -> dict[str, Any]:
        """The counts: a test that fails is a wrong result, whatever it tried."""
        counts = {group: sum(kinds.values()) for group, kinds in sorted(self.groups.items())}
        return {
            "format": "manifold_cl.reliability",
            "version": 1,
            "counts": {**counts, "wrong results": self.tests["failed"]},
            "kinds": {group: dict(sorted(kinds.items())) for group, kinds in sorted(self.groups.items())},
            "complete": self.complete,
            "tests": dict(self.tests),
            "skipped": self.skipped,
            "seconds": round(time.monotonic() - self.began, 1),
            "cores": os.cpu_count(),
            "versions": library_versions(),
            "machine": machine(),
        }
