"""All tests here are slow; a complete run of ``make properties`` leaves its counts in a file."""

import os
from pathlib import Path

import property_cases
import pytest

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = os.environ.get("MANIFOLD_CL_PROPERTIES_OUT")
    if not target or not property_cases.ran or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return  # an interrupted run has counted a part only
    names = dict(sorted(property_cases.ran.items()))
    content = {
        "what": "cases that ran and held, per property, with new random seeds",
        "profile": property_cases.PROFILE,
        "properties": len(names),
        "cases": sum(names.values()),
        "failed": session.testsfailed,
        "by_property": names,
        "versions": library_versions(),
        "machine": machine(),
    }
    write_json(Path(target), content)
