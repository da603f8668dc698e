"""Export of run folders, and export over an older export."""

import json
from pathlib import Path

import pytest
import torch
from kills import killed_at
from records import write_record
from safetensors.torch import load_file
from torch import nn

from manifold_cl import EBLoRALinear, export_lora, inject_adapters, save_adapters
from manifold_cl.files import FileError, write_json


def small(seed: int = 0, rank: int = 2) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapters(model, ["0"], lambda _, base: EBLoRALinear(base, rank, initial_scale=1.0 + seed, generator=draw))
    return model


def saved_run(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        save_adapters(small(number), folder / "tasks" / f"{number + 1:02d}-{name}", task=name)
    return folder


def test_a_run_that_lost_a_task_is_not_exported(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", "a", "b", "c")
    write_record(run, ["a", "b", "c"])
    assert export_lora(run, tmp_path / "whole")["0"].rank == 6
    (run / "tasks" / "02-b" / "adapter.safetensors").unlink()
    with pytest.raises(FileError, match=r"02-b/adapter\.safetensors does not exist, though .*record\.json"):
        export_lora(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_tasks_of_the_record_are_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = saved_run(tmp_path / "run", "a", "b", "c")
    save_adapters(small(7), run / "tasks" / "01-other")  # of a run that was here before
    write_record(run, ["a", "b", "c"], learned=2, status="running")
    assert export_lora(run, tmp_path / "out")["0"].rank == 4
    assert "is not complete: 2 of 3 tasks are exported" in caplog.text
    assert "left out 01-other, 03-c, not among the record's finished tasks" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": "abc"}, r"record\.json does not follow its format"),
        ({"tasks": ["a", "../../b", "c"]}, r"the task '\.\./\.\./b' cannot name a folder"),
        ({"losses": 3}, r"record\.json does not follow its format"),
        ({"tasks": None}, r"record\.json does not follow its format"),
        ({"status": None, "losses": []}, "is a run without a finished task"),
    ],
)
def test_a_record_that_is_no_record_is_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", "a", "x", "c")
    write_record(run, ["a", "b", "c"])
    record = json.loads((run / "record.json").read_text())
    write_json(run / "record.json", {**record, **changed})
    with pytest.raises(FileError, match=message):
        export_lora(run, tmp_path / "out")


def test_nothing_with_nan_is_exported(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model[0].scale.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"0\.lora_B\.weight of Sequential has NaN or infinite entries"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_killed_export_over_another_one_is_complete_or_refused(number: int, tmp_path: Path) -> None:
    """New tensors with the old scaling would be loaded by PEFT; it refuses a folder without a configuration."""
    out = tmp_path / "out"
    export_lora(small(0, rank=2), out)
    config = json.loads((out / "adapter_config.json").read_text())
    write_json(out / "adapter_config.json", {**config, "lora_alpha": 32})  # scaled 16 times, by another tool
    assert killed_at(number, lambda: export_lora(small(1, rank=3), out) and None) == (number < 4)
    assert (out / "adapter_config.json").exists() == (number > 2)  # the last of three renames
    export_lora(small(1, rank=3), out)
    rank = json.loads((out / "adapter_config.json").read_text())["r"]
    left = load_file(out / "adapter_model.safetensors")["base_model.model.0.lora_B.weight"]
    assert (rank, tuple(left.shape)) == (3, (5, 3))
