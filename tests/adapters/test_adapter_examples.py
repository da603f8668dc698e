"""The examples run from end to end and say what they promise."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    # PEFT and Trainer ask transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_peft_quickstart_reloads_identical_logits_and_exports(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("peft_quickstart.py", monkeypatch, "--out", str(tmp_path))
    said = capfd.readouterr().out
    assert "reloaded in a new process: logits identical: True" in said
    difference = float(said.rsplit("logits differ by ", 1)[1].split()[0])
    assert difference < 5e-6  # float32 logits near 5
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_the_trainer_example_resumes_to_the_same_parameters(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run("hf_trainer.py", monkeypatch, "--steps", "8", "--out", str(tmp_path))
    assert "resumed from half-way: the same parameters: True" in capfd.readouterr().out
