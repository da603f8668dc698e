"""Recorded searches: equal budgets, correct winners, and defaults equal to them."""

import json
from pathlib import Path
from typing import Any

import pytest

from manifold_cl.continual import make_method

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOUND: dict[str, dict[str, Any]] = {
    path.stem.removeprefix("tuning-"): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((BENCHMARKS / "results").glob("tuning-*.json"))
}
PRESETS = {"eblora-official", "stella_merge-full"}
"""Labels of methods whose default is another preset."""
searches = pytest.mark.parametrize("label", sorted(FOUND))


def test_every_search_had_the_same_number_of_trials() -> None:
    assert {len(found["trials"]) for found in FOUND.values()} == {7}


@searches
def test_the_winner_is_the_first_of_the_best_and_all_listed_trials_were_run(label: str) -> None:
    found = FOUND[label]
    assert found["winner"] == max(found["trials"], key=lambda trial: trial["mfn"])["options"]
    listed = json.loads((BENCHMARKS / "search" / f"{label}.json").read_text(encoding="utf-8"))
    assert [trial["options"] for trial in found["trials"]] == listed["trials"]
    assert (found["method"], found["stream"], found["seed"]) == (listed["method"], listed["stream"], listed["seed"])


@searches
def test_a_method_by_name_is_the_winner(label: str) -> None:
    options = FOUND[label]["winner"]
    default = make_method(FOUND[label]["method"]).options()
    assert (options.items() <= default.items()) == (label not in PRESETS)
