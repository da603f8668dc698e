"""The slow suite runs at least five thousand cases."""

import importlib
from pathlib import Path


def test_the_suite_has_five_thousand_cases():
    files = sorted(Path(__file__).parent.glob("test_*_properties.py"))
    assert len(files) >= 5
    tests = [test for path in files for test in vars(importlib.import_module(path.stem)).values()]
    assert sum(getattr(test, "cases", 0) for test in tests) >= 5000
