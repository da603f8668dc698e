"""The examples run, and the table of defaults on the page on adapters is true; `test_snippets` runs its code."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manifold_cl.adapters import EBLoRAOptions
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.continual import make_method

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_the_peft_quickstart_reloads_identical_logits_and_exports(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("peft_quickstart.py", monkeypatch, "--out", str(tmp_path))
    said = capfd.readouterr().out
    assert "reloaded in a new process: logits identical: True" in said
    difference = float(said.rsplit("logits differ by ", 1)[1].split()[0])
    assert difference < 5e-6  # float32 logits near 5
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_trainer_example_resumes_to_the_same_parameters(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run("hf_trainer.py", monkeypatch, "--steps", "8", "--out", str(tmp_path))
    assert "resumed from half-way: the same parameters: True" in capfd.readouterr().out


def test_the_table_of_defaults_on_the_page_on_adapters_is_true() -> None:
    rows = re.findall(
        r"^\| `(rank|alpha|initial_scale)` \| (.+?) \| (.+?) \| (.+?) \|", PAGE.read_text(), flags=re.MULTILINE
    )
    config, method = EBLoraConfig(), make_method("eblora")
    assert {name: rest for name, *rest in rows} == {
        "rank": ["required", str(config.r), str(method.rank)],
        "alpha": ["the rank", "the rank", f"{method.alpha:g}"],
        "initial_scale": [str(EBLoRAOptions.initial_scale), str(config.initial_scale), str(method.initial_scale)],
    }
    assert config.alpha is EBLoRAOptions.alpha is None


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"],  # as on docs/adapters.md
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_the_trainer_example_runs_on_two_processes(launcher: str, tmp_path: Path) -> None:
    launch = [sys.executable, *LAUNCHERS[launcher]]
    script = [str(EXAMPLES / "hf_trainer.py"), "--steps", "8", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launch, *script], capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("resumed from half-way: the same parameters: True") == 1  # one speaks for both
    alone = {k: v for k, v in environment.items() if k != "WORLD_SIZE"} | {"WORLD_SIZE": "2"}
    ended = subprocess.run([sys.executable, script[0]], capture_output=True, text=True, check=False, env=alone)
    assert "several processes share their checkpoints: give --out" in ended.stderr
