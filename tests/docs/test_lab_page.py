"""The page on retractions and steps shows the numbers of the committed measurement."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import manifold_cl
from manifold_cl import RETRACTIONS
from manifold_cl.infeasible import INFEASIBLE_STEPS
from manifold_cl.lab import PROBLEMS, STEPS

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = (ROOT / "docs/which-retraction.md").read_text(encoding="utf-8")
CONTENT: Any = json.loads((ROOT / "benchmarks/results/lab.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", name="script")
def lab_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_lab", ROOT / "benchmarks/lab.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_measurement(script: ModuleType) -> None:
    for names in (script.steps_of(CONTENT), script.retractions_of(CONTENT)):
        assert "\n".join(script.table(CONTENT, names)) in PAGE


def test_every_own_problem_and_contestant_was_measured() -> None:
    names = {c["name"] for c in CONTENT["contestants"]}
    assert names - {f"momentum + {rule}" for rule in RETRACTIONS} == {*STEPS, *INFEASIBLE_STEPS}
    assert [p["name"] for p in CONTENT["problems"]] == list(PROBLEMS)
    for problem in CONTENT["problems"]:
        n, p, k = problem["shape"]
        assert f"| `{problem['name']}` | {n}, {p}, {k} |" in PAGE
        assert PROBLEMS[problem["name"]]().optimum == pytest.approx(problem["optimum"], rel=1e-10, abs=1e-12)


def test_the_times_and_claims_are_those_of_the_measurement(script: ModuleType) -> None:
    assert f"{CONTENT['cpu_seconds']:.0f} s of CPU time" in PAGE
    assert CONTENT["wall_seconds"] < 5 * 60  # the aim: five minutes on two cores
    assert f"{CONTENT['wall_seconds'] / 60:.1f} minutes on two idle cores" in PAGE
    assert max(r["leak"] for r in CONTENT["results"]) < 1e-14
    best = [max((c for c in CONTENT["contestants"] if unit in c), key=lambda c: c[unit]["area"]) for unit in UNITS]
    assert {c["name"] for c in best} == {"conjugate_gradient"}


def test_the_answer_is_that_of_the_measurement() -> None:
    named = {c["name"]: c for c in CONTENT["contestants"]}
    conjugate, adamw = named["conjugate_gradient"], named["adamw"]
    assert f"{100 * conjugate['evaluations']['best_share']:.0f} % of the instances" in " ".join(PAGE.split())
    assert f"{conjugate['seconds']['profile'][-1][0] + 0.05:.1f} times the seconds" in " ".join(PAGE.split())
    assert adamw["evaluations"]["profile"][-1][0] <= 2
    assert conjugate["seconds"]["solved_share"] == adamw["evaluations"]["solved_share"] == 1
    rules = [c for c in CONTENT["contestants"] if c["step"] == "momentum"]
    areas = [c["evaluations"]["area"] for c in rules]
    assert max(areas) - min(areas) < 0.05
    fastest = sorted(rules, key=lambda c: -c["seconds"]["area"])[:3]
    assert {c["retraction"] for c in fastest} == {"cholesky_qr", "qr", "polar"}
    solved = {c["evaluations"]["solved_share"] for c in (named["pogo"], named["landing"], named["momentum"])}
    assert solved == {10 / 12}


UNITS = ("evaluations", "seconds")
