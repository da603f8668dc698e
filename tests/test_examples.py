"""The examples run from end to end, on one process and on two."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manifold_cl.adapters import target_linears
from manifold_cl.plugins import load_object

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LLAVA = ROOT / "examples" / "llava_continual.py"

pytest.importorskip("transformers")


def run(*command: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root, with the package from there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "--tiny", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def figures(folder: Path) -> dict[str, float]:
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "complete"
    return dict(record["metrics"])


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_the_llava_example_needs_data_or_tiny(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(LLAVA)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ended.returncode == 2
    assert "give either --tiny or --data FOLDER" in ended.stderr


def test_the_llava_example_learns_forgets_and_protects(tmp_path: Path) -> None:
    said = run(sys.executable, str(LLAVA), out=tmp_path).stdout
    sequential, eblora = figures(tmp_path / "sequential_merge"), figures(tmp_path / "eblora")
    assert sequential["zero_shot"] == eblora["zero_shot"] == 0
    # Colours are learned to well above the quarter that guessing gives; plain LoRA then forgets them, EBLoRA does not.
    assert min(sequential["mft"], eblora["mft"]) > 50
    assert sequential["bwt"] < -50
    assert eblora["bwt"] > -25
    assert "MFT" in said
    assert "ImageNet-R" in said


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_llava_example_runs_on_two_ranks(launcher: str, tmp_path: Path) -> None:
    port = free_port()
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    else:
        pytest.importorskip("accelerate")
        # --multi_gpu makes Accelerate start processes by itself; what they run on is the script's --device.
        command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    run(sys.executable, *command, str(LLAVA), "--method", "eblora", out=tmp_path)
    assert figures(tmp_path / "eblora")["mft"] > 50
    record = json.loads((tmp_path / "eblora/record.json").read_text())
    assert record["config"]["ranks"] == 2
    answers = sorted(p.name for p in (tmp_path / "eblora/results/03/IconQA").glob("answers-*.jsonl"))
    assert answers == ["answers-0.jsonl", "answers-1.jsonl"]  # both ranks have answered


def test_the_llava_example_trains_the_projector_where_it_is_asked_to(tmp_path: Path) -> None:
    run(sys.executable, str(LLAVA), "--method", "sequential_merge", "--train-projector", out=tmp_path)
    record = json.loads((tmp_path / "sequential_merge/record.json").read_text())
    assert record["provenance"]["companions"]["parameters"] > 0
    assert record["provenance"]["projector"] == "trained"


def test_the_stream_of_texts_opens_and_keeps_its_pre_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "examples" / "three_texts.py", tmp_path)
    stream = load_object(f"{tmp_path / 'three_texts.py'}:texts")(tasks=["names", "code"], examples=32)
    module = sys.modules[type(stream.tasks[0]).__module__]
    monkeypatch.setattr(module.pretrained, "__defaults__", (3, 8))
    model = stream.make_model()
    assert (tmp_path / "three_texts.pt").exists()
    assert torch.equal(model.head.weight, stream.make_model().head.weight)
    assert not any(p.requires_grad for p in model.parameters())
    names = stream.tasks[0]
    assert [names.size(split) for split in ("train", "validation", "test")] == [32, 50, 100]
    assert 0 <= names.scores(model)["accuracy"] <= 100
    assert target_linears(model, stream.targets).keys() >= {"blocks.0.qkv", "blocks.1.down"}
    assert names.loss(model, next(iter(names.batches("train", batch_size=8)))).isfinite()


def test_the_fsdp2_example_learns_on_two_ranks_and_stores_what_the_plan_says(tmp_path: Path) -> None:
    """Weights and factors are sharded, later tasks stay outside the memory, and earlier updates go on acting."""
    from transformers import LlamaConfig

    from manifold_cl import memory_plan

    script = ROOT / "examples" / "llama_7b_fsdp2.py"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    options = ["--rank", "4", "--energy", "0.9", "--epochs", "6", "--lr", "1e-2", "--checkpointing"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, *launch, str(script), *options, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    written = json.loads((tmp_path / "losses.json").read_text())
    (first, unlearned), (_, second) = written["losses"]
    assert max(first, second) < unlearned - 0.3
    assert written["constraint"] <= 2e-6
    config = LlamaConfig(
        vocab_size=21, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    plan = memory_plan(config, rank=4, devices=2, dtype="bfloat16", batch=8, tokens=8)
    # Shares are rounded up to whole rows; the position table and its like are on every device.
    assert written["bytes"]["base weights"] == pytest.approx(plan["base weights"], rel=0.01)
    assert written["bytes"]["factors"] == pytest.approx(plan["factors"], rel=0.02)
    (memory,) = (tmp_path / "task-1").glob("memory.safetensors")
    from manifold_cl import SubspaceMemory

    protected = SubspaceMemory.load(memory.parent)
    assert protected.tasks == ("shift by 1", "shift by 5")
    assert written["bytes"]["protected bases"] > 0


@pytest.mark.slow  # ContinualTrainer on TRL's own trainer is tested in integrations, fast and slow
def test_the_trl_example_runs_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    command = [sys.executable, "examples/trl_sft_continual.py", "--methods", "eblora", "--epochs", "1"]
    shown = []
    for more in ([], ["--resume"]):
        ended = subprocess.run(
            [*command, "--out", str(tmp_path), *more],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        shown.append(ended.stdout)
    assert figures(tmp_path / "eblora")["mft"] > 50  # 33 to 50 % are guessed
    assert shown[1].splitlines()[-4:] == shown[0].splitlines()[-4:]
