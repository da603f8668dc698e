"""Commands that open a pre-trained model refuse one with a weight that is NaN, by its name."""

import json
from pathlib import Path

import pytest
import torch
import toy
from command import Call
from tiny_decoder import decoder, tokenizer

from analysis.formats import save_lora

BROKEN = f"""
import sys
from dataclasses import replace

sys.path.append({str(Path(toy.__file__).parent)!r})
from toy import frozen_model, toy_stream

def broken_model():
    model = frozen_model()
    model.head.weight.data[1, 2] = float("nan")
    return model

def broken(**cut):
    return replace(toy_stream(**cut), make_model=broken_model)
"""


@pytest.fixture
def stream(tmp_path: Path) -> str:
    (tmp_path / "streams.py").write_text(BROKEN)
    return f"{tmp_path / 'streams.py'}:broken"


def adapter(folder: Path, layer: str, m: int, n: int) -> Path:
    return save_lora(folder / "ad", [("news", [("news", layer, torch.ones(m, 2), torch.eye(n, 2))])]) / "01-news"


def refused(call: Call, weight: str, *command: object) -> None:
    code, _, err = call(*command)
    assert code == 2
    assert f"{weight} of the pre-trained model has NaN or infinite entries" in err


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--method", "sequential_merge", "--set", "rank=2"),
        ("subspace", "build", "--rank", "2"),
        ("subspace", "build", "--rank", "2", "--weights", "0.3"),
    ],
)
def test_run_and_subspace_build(command: tuple[str, ...], stream: str, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(call, "head.weight", *command, "--stream", stream, "--out", out)
    assert not [path for path in out.rglob("*.*") if path.name != "run.lock"]


def test_study_and_search_before_a_cell_starts(stream: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(f'stream = "{stream}"\nrank = 2\n[methods.zero_shot]\n')
    refused(call, "head.weight", "study", tmp_path / "one.toml", "--out", tmp_path / "study")
    trials = {"method": "sequential_merge", "stream": stream, "seed": 5, "trials": [{"rank": 2, "lr": 0.03}]}
    (tmp_path / "one.json").write_text(json.dumps(trials))
    refused(call, "head.weight", "search", tmp_path / "one.json", "--out", tmp_path / "search")
    assert not list(tmp_path.rglob("record.json"))


def test_a_gate_on_a_stream(stream: str, call: Call, tmp_path: Path) -> None:
    """The scores before and after would be equal, so that the gate would pass."""
    folder = adapter(tmp_path, "inner", 16, 24)
    command = ("analyze", "suggest", folder, "--keep", "0.5", "--stream", stream, "--out", tmp_path / "new")
    refused(call, "head.weight", *command)


def test_measurements_with_a_language_model(call: Call, tmp_path: Path) -> None:
    model = decoder()
    model.get_parameter("model.norm.weight").data[3] = float("nan")
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "red green blue"}) + "\n")
    folder = adapter(tmp_path, "model.layers.0.self_attn.q_proj", 32, 32)
    data = ("--model", tmp_path / "base", "--data", tmp_path / "data.jsonl")
    command = ("analyze", "suggest", folder, *data, "--keep", "0.8", "--out", tmp_path / "new")
    refused(call, "model.norm.weight", *command)
