"""The section "Ten thousand steps" of docs/optimizers.md shows the committed runs, complete and within their limits."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import manifold_cl
from manifold_cl import RETRACTIONS
from manifold_cl.infeasible import INFEASIBLE_STEPS

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = (ROOT / "docs/optimizers.md").read_text(encoding="utf-8")
FOUND = json.loads((ROOT / "benchmarks/results/soak.json").read_text(encoding="utf-8"))
RUNS: dict[str, Any] = FOUND["results"]
WITH = {name: run for name, run in RUNS.items() if name not in INFEASIBLE_STEPS}
WITHOUT = {name: run for name, run in RUNS.items() if name in INFEASIBLE_STEPS}


def largest(runs: Mapping[str, Any], key: str) -> float:
    """The largest value of a key, over runs and kinds of gradient."""
    values: Iterable[float] = (
        value for run in runs.values() for value in (run[key].values() if isinstance(run[key], dict) else [run[key]])
    )
    return max(values)


def row(label: str, *values: float, shown: str = "{:.1e}") -> str:
    """The start of a line of the table: what was measured, with a retraction and without one."""
    return f"| {label} at most {shown.format(values[0])} | at most {shown.format(values[1])}"


def test_the_table_shows_the_largest_values_of_the_run() -> None:
    assert f"| steps with a retraction, {len(WITH)} | steps without one, {len(WITHOUT)} | limit |" in PAGE
    returned = max(run["returned"] for run in WITHOUT.values())
    assert row("$x^\\top x - I$", largest(WITH, "orthonormality"), returned) in PAGE
    assert row("$F^\\top x$", largest(WITH, "protection"), largest(WITHOUT, "protection")) in PAGE
    growth = [100 * largest(runs, "memory_growth") for runs in (WITH, WITHOUT)]
    assert row("memory grows by", *growth, shown="{:.2f} %") in PAGE
    slowdown = [largest(runs, "slowdown") for runs in (WITH, WITHOUT)]
    assert row("last steps / first steps", *slowdown, shown="{:.2f}") in PAGE


def test_the_run_is_complete_and_within_its_limits() -> None:
    assert FOUND["steps"] == 10_000
    assert {f"adamw + {name}" for name in RETRACTIONS} <= set(WITH)
    assert set(WITHOUT) == set(INFEASIBLE_STEPS)
    assert not [name for name, run in RUNS.items() if run["broken"] or run["steps"] != FOUND["steps"]]
    assert max(largest(WITH, "orthonormality"), largest(RUNS, "protection")) <= FOUND["limits"]["constraint"] <= 2e-6
    assert largest(RUNS, "memory_growth") <= FOUND["limits"]["memory_growth"] <= 0.01


def test_the_page_shows_the_cases_that_held() -> None:
    drawn = json.loads((ROOT / "benchmarks/results/properties.json").read_text(encoding="utf-8"))
    assert f"drew {drawn['cases']} cases of {drawn['properties']} properties" in PAGE
    assert drawn["failed"] == 0
    assert drawn["cases"] == sum(drawn["by_property"].values()) >= 50_000
