"""Committed simulations of false alarms."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def test_committed_simulations_keep_false_alarms_at_five_percent() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "false-alarms.json").read_text(encoding="utf-8"))
    assert results["simulations"] >= 1000
    for name, setting in results["settings"].items():
        assert setting["alarms"]["low"] <= 0.05, name  # the interval of the rate reaches the level
    rates = [setting["alarms"]["rate"] for setting in results["settings"].values()]
    assert np.mean(rates) <= 0.05


def test_the_page_has_the_numbers_of_the_file() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "false-alarms.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "analysis-report.md").read_text(encoding="utf-8")
    for setting in results["settings"].values():
        assert f"| {setting['alarms']['rate']:.1%} | {setting['any_layer']['rate']:.1%} |".replace("%", " %") in page
