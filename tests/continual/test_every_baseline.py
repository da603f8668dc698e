"""What all baselines have in common: they learn, resume, and refuse options that cannot be."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from baseline_runs import OPTIONS, run_of, stage, trained
from old_versions import HAS_MUON
from toy import frozen_model

from manifold_cl import METHODS
from manifold_cl.continual import make_method
from manifold_cl.tensor_files import read_tensors

methods = pytest.mark.parametrize("name", sorted(OPTIONS))


def test_the_list_here_is_the_registry() -> None:
    assert set(OPTIONS) | {"eblora", "sequential_merge", "zero_shot"} == set(METHODS)


@methods
def test_every_method_learns_something(name: str, tmp_path: Path) -> None:
    record = run_of(tmp_path, name).run()
    assert record.status == "complete"
    before = sum(record.zero_shot["accuracy"]) / 3
    assert record.metrics["mft"] > before + 5  # 25 % by chance; every method passes 40
    assert all(task_losses or name == "joint" for task_losses in record.losses)


@methods
def test_every_method_resumes_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    straight = run_of(tmp_path / "straight", name).run()
    last = 0 if name == "joint" else 2  # joint trains at its first stage only
    run_of(tmp_path / "stopped", name, stop_after=last)
    resumed = run_of(tmp_path / "stopped", name).run(resume=True)
    assert resumed.losses == straight.losses
    assert resumed.accuracy == straight.accuracy
    again = run_of(tmp_path / "stopped", name)
    assert again.run(resume=True).metrics == straight.metrics  # a complete run is read, not repeated


@methods
def test_every_method_forgets_its_state_where_nothing_was_finished(name: str) -> None:
    """A run goes on with the same object after an error in its first task."""
    method, model = trained(name, tasks=1)
    fresh = make_method(name, **OPTIONS[name])
    method.end_task(model, stage())
    method.restore(frozen_model(), [])
    states = [field.name for field in fields(method) if not field.init and not field.name.startswith("_")]
    assert {state: getattr(method, state) for state in states} == {state: getattr(fresh, state) for state in states}


@pytest.mark.parametrize("name", ["best", "gpm", "inflora", "keeplora", "lora_muon_ogd", "restricted"])
def test_a_memory_on_disk_says_which_task_was_last(name: str, tmp_path: Path) -> None:
    method, model = trained(name, tasks=1)
    method.end_task(model, stage())
    method.save_state(tmp_path, stage())
    assert read_tensors(tmp_path / "memory.safetensors")[1]["task"] == "first"


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        *((name, {"lr": -1.0}, ValueError, r"lr is a positive number, got -1\.0") for name in OPTIONS),
        *((name, {"rank": 0}, ValueError, "rank must be at least 1, got 0") for name in sorted(set(OPTIONS) - {"gpm"})),
        *((name, {"alpha": 0.0}, ValueError, "alpha is a positive number") for name in sorted(set(OPTIONS) - {"gpm"})),
        *(
            (name, {"energy": 7.0}, ValueError, r"energy is a share in \(0, 1\], got 7\.0")
            for name in ("gpm", "inflora", "keeplora", "lora_muon_ogd", "restricted")
        ),
        *(
            (name, {"statistic_examples": 0}, ValueError, "statistic_examples must be at least 1, got 0")
            for name in ("balanced", "gpm", "inflora", "keeplora", "lora_muon_ogd", "restricted")
        ),
        ("keeplora", {"from_weights": 2.0}, ValueError, r"from_weights is a share in \(0, 1\], got 2\.0"),
        ("restricted", {"from_weights": 1.0}, ValueError, r"from_weights is a share in \[0, 1\), got 1\.0"),
        ("restricted", {"scale_lr": 0.0}, ValueError, "scale_lr is a positive number"),
        ("restricted", {"scale_decay": -0.1}, ValueError, "scale_decay is a finite number from 0 on"),
        ("restricted", {"initial_scale_last": "deep"}, TypeError, "initial_scale_last is a number, got 'deep'"),
        ("inflora", {"last_energy": 0.0}, ValueError, r"last_energy is a share in \(0, 1\], got 0\.0"),
        ("lora_muon", {"momentum": 1.0}, ValueError, r"momentum is a share in \[0, 1\), got 1\.0"),
        ("lora_muon", {"adjust_lr_fn": "none"}, ValueError, "adjust_lr_fn is one of match_rms_adamw, original"),
        ("lora_muon_ogd", {"weight_decay": -0.1}, ValueError, "weight_decay is a finite number from 0 on"),
        ("lora_muon_ogd", {"source": "hessian"}, ValueError, "source is sensitivity, activation, gradient"),
        ("gpm", {"growth": -0.1}, ValueError, "growth is a finite number from 0 on"),
        ("olora", {"orthogonality": float("nan")}, ValueError, "orthogonality is a finite number from 0 on, got nan"),
        ("stella_merge", {"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        ("stella_merge", {"initial_scale": float("inf")}, ValueError, "initial_scale is a finite number, got inf"),
    ],
)
def test_options_that_cannot_be_are_refused_where_they_enter(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    make_method(name, **OPTIONS[name])
    with pytest.raises(error, match=message):
        make_method(name, **{**OPTIONS[name], **options})


@pytest.mark.parametrize("option", ["energy", "source", "policy", "statistics_at", "from_weights"])
def test_balanced_has_no_options_of_a_memory(option: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option of balanced '{option}'"):
        make_method("balanced", **{option: 1})


@pytest.mark.slow
def test_no_method_touches_global_state(tmp_path: Path) -> None:
    script = Path(__file__).with_name("every_method.py")
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=True)
    changed = json.loads(ended.stdout)
    missing = set() if HAS_MUON else {"lora_muon"}
    assert changed.keys() == set(METHODS) - missing
    assert {name: states for name, states in changed.items() if states} == {}
