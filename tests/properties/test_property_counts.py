"""The slow suite runs at least five thousand cases; counts are those of complete runs."""

import importlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import property_cases
import pytest

HERE = Path(__file__).parent


def test_the_suite_has_five_thousand_cases():
    files = sorted(HERE.glob("test_*_properties.py"))
    assert len(files) >= 5
    tests = [test for path in files for test in vars(importlib.import_module(path.stem)).values()]
    assert sum(getattr(test, "cases", 0) for test in tests) >= 5000


def test_an_interrupted_run_leaves_no_counts(monkeypatch, tmp_path):
    finish, path = runpy.run_path(str(HERE / "conftest.py"))["pytest_sessionfinish"], tmp_path / "counts.json"
    monkeypatch.setenv("MANIFOLD_CL_PROPERTIES_OUT", str(path))
    monkeypatch.setattr(property_cases, "ran", {"one": 3})
    finish(SimpleNamespace(testsfailed=0), pytest.ExitCode.INTERRUPTED)
    assert not path.exists()
    finish(SimpleNamespace(testsfailed=1), pytest.ExitCode.TESTS_FAILED)
    assert (content := json.loads(path.read_text()))["failed"] == 1
    assert content["cases"] == 3
