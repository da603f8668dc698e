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
PRESETS = {"best", "eblora-official", "stella_merge-full"}
"""Labels of methods whose default is another preset (for `best`, decision 0032)."""
BUDGET = 7
RATES = (BENCHMARKS.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
searches = pytest.mark.parametrize("label", sorted(FOUND))


@searches
def test_every_search_had_the_same_number_of_trials_or_is_named_as_unfinished(label: str) -> None:
    (row,) = [line for line in RATES.splitlines() if f"(../benchmarks/results/tuning-{label}.json)" in line]
    count = len(FOUND[label]["trials"])
    assert count == BUDGET or f"({count} of {BUDGET} trials)" in row
    assert count <= BUDGET
    assert ("trials)" in row) == (count < BUDGET)


@searches
def test_the_winner_is_the_first_of_the_best_and_all_listed_trials_were_run(label: str) -> None:
    found = FOUND[label]
    assert found["winner"] == max(found["trials"], key=lambda trial: trial["mfn"])["options"]
    listed = json.loads((BENCHMARKS / "search" / f"{label}.json").read_text(encoding="utf-8"))
    done = [trial["options"] for trial in found["trials"]]
    assert done == listed["trials"][: len(done) if len(done) < BUDGET else None]
    assert (found["method"], found["stream"], found["seed"]) == (listed["method"], listed["stream"], listed["seed"])


@searches
def test_a_method_by_name_is_the_winner(label: str) -> None:
    options = FOUND[label]["winner"]
    of_the_step = {key: options[key] for key in ("step", "direction") if "direction" in options}
    default = make_method(FOUND[label]["method"], **of_the_step).options()
    assert (options.items() <= default.items()) == (label not in PRESETS)
