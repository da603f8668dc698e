"""A short soak: every step in the registries takes part and keeps its limits; broken ones are reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manifold_cl import RETRACTIONS
from manifold_cl.infeasible import INFEASIBLE_STEPS
from manifold_cl.lab import STEPS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak.py"
SOLVERS = {"trust_regions", "conjugate_gradient"}
"""Steps of the lab that end by themselves: a new one must be named here, or take part."""


def soak(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)


@pytest.mark.slow
def test_every_step_takes_part_and_keeps_its_limits(tmp_path: Path):
    done = soak("--steps", "45", "--out", str(tmp_path / "soak.json"))
    content = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    results, left_out = content["results"], content["left_out"]
    assert {name for name in left_out if not name.startswith("torch.optim.")} == SOLVERS
    assert {f"adamw + {name}" for name in RETRACTIONS} | set(STEPS) | set(INFEASIBLE_STEPS) <= results.keys() | SOLVERS
    for name, found in results.items():
        # A short run warms up in the middle of its windows: memory and time are measured by the long one only.
        assert set(found["broken"]) <= {"time", "memory"}, (name, found)
        assert "error" not in found
    assert done.returncode in (0, 1)


@pytest.mark.slow
def test_an_unknown_step_is_refused():
    done = soak("--only", "polka")
    assert done.returncode == 2
    assert "no step named 'polka'" in done.stderr


@pytest.mark.slow
def test_a_soak_that_was_cut_goes_on_where_it_stopped(tmp_path: Path):
    path = tmp_path / "soak.json"
    assert soak("--only", "adamw + cayley", "sgd", "--steps", "30", "--out", str(path)).returncode in (0, 1)
    content = json.loads(path.read_text())
    content["results"]["sgd"] = {**content["results"]["sgd"], "marked": True}
    first = content["results"].pop("adamw + cayley")
    path.write_text(json.dumps(content))
    done = soak("--resume", "--only", "adamw + cayley", "sgd", "--steps", "30", "--out", str(path))
    results = json.loads(path.read_text())["results"]
    assert results["sgd"]["marked"]
    assert results["adamw + cayley"]["protection"] == first["protection"]
    assert '"sgd"' not in done.stdout


@pytest.mark.slow
def test_a_part_does_not_replace_results_of_other_steps(tmp_path: Path):
    path = tmp_path / "soak.json"
    path.write_text('{"steps": 10000, "results": {"newest": {}}}')
    done = soak("--only", "adamw + cayley", "--steps", "45", "--out", str(path))
    assert done.returncode == 2
    assert "soak.json holds results of other --steps" in done.stderr
    assert "newest" in path.read_text()


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"protection": {"coherent": 3e-6, "noise": 0.0}}, ["constraint"]),
        ({"orthonormality": {"coherent": 0.0, "noise": float("inf")}}, ["constraint"]),
        ({"memory_growth": 0.02}, ["memory"]),
        ({"slowdown": 1.4}, ["time"]),
        ({"error": "ValueError: no"}, ["failed"]),
    ],
)
def test_a_broken_limit_is_named(change, broken, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from soak import Soak, broken_limits

    errors = {"coherent": 1e-7, "noise": 1e-7}
    good = {"orthonormality": errors, "protection": errors, "memory_growth": 0.001, "slowdown": 1.0}
    assert broken_limits(Soak(lambda *_: [], {}), good | change) == broken
