"""Everything in the files that is no part of an update is in the table of what is left out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis import AdapterSet, AdapterTables, flattened

A, B = torch.ones(2, 5), torch.ones(4, 2)


def lora(folder: Path, *layers: str, **more: Tensor) -> Path:
    folder.mkdir(parents=True)
    tensors = {
        f"base_model.model.{layer}.lora_{part}.weight": value.clone()
        for layer in layers
        for part, value in (("A", A), ("B", B))
    }
    save_file(tensors | more, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def rows(adapters: AdapterSet) -> set[tuple[str, str, str, str]]:
    table = AdapterTables(adapters).left_out
    assert list(table.columns) == ["task", "file", "tensor", "reason"]
    return {(row.task, Path(row.file).name, row.tensor, row.reason) for row in table.itertuples()}


def test_every_tensor_and_file_of_a_folder_that_is_not_read_is_listed(tmp_path: Path) -> None:
    extra = {"base_model.model.head.weight": torch.ones(3, 5), "base_model.model.q.bias": torch.ones(4)}
    extra["base_model.model.wte.token_adapter.trainable_tokens_delta"] = torch.ones(2, 5)
    folder = lora(tmp_path / "one", "q", "v", **extra)
    torch.save({}, folder / "adapter_model.bin")
    (lora(folder / "checkpoint-5", "q") / "README.md").write_text("")
    adapters = AdapterSet.load(folder, layers="q$")
    file = "adapter_model.safetensors"
    expected = {
        ("one", file, "base_model.model.head.weight", "module saved in full (modules_to_save)"),
        ("one", file, "base_model.model.q.bias", "bias"),
        ("one", file, next(reversed(extra)), "new rows of an embedding (trainable_token_indices)"),
        ("one", "adapter_model.bin", "", f"{file} was read in its place"),
        ("one", "checkpoint-5", "", "another adapter in a subfolder"),
        ("one", file, "v", "not found by layers='q$'"),
    }
    assert rows(adapters) == expected
    assert rows(flattened(adapters, 1.0)) == expected  # a changed set lacks the same parts


def test_layers_that_not_all_tasks_have_are_listed_per_task(tmp_path: Path) -> None:
    adapters = AdapterSet.load(lora(tmp_path / "one", "q", "v"), lora(tmp_path / "two", "q", "k"), common=True)
    file = "adapter_model.safetensors"
    assert rows(adapters) == {
        (task, file, layer, "not a layer of all tasks") for task, layer in (("one", "v"), ("two", "k"))
    }


@pytest.mark.parametrize("pattern", [None, "q"])
def test_tensors_of_checkpoints_that_are_not_compared_are_listed(tmp_path: Path, pattern: str | None) -> None:
    before = {"q.weight": torch.zeros(4, 5), "q.bias": torch.zeros(4), "old.weight": torch.zeros(2, 2)}
    after = {"q.weight": torch.ones(4, 5), "q.bias": torch.ones(4), "new.weight": torch.zeros(2, 2)}
    save_file(before, tmp_path / "before.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    path = tmp_path / "after.safetensors"
    adapters = AdapterSet.load(path, base=tmp_path / "before.safetensors", layers=pattern)
    expected = {("after", "after.safetensors", "q.bias", "differs and is no matrix")}
    if pattern is None:
        reason = "in one of the two checkpoints only"
        expected |= {("after", "after.safetensors", "new.weight", reason)}
        expected |= {("after", "before.safetensors", "old.weight", reason)}
    else:
        expected |= {("after", "after.safetensors", "new.weight", "not found by layers='q'")}
    assert rows(adapters) == expected


def test_factors_in_memory_leave_nothing_out() -> None:
    adapters = AdapterSet.from_factors({"a": {"q": (B, A.T)}})
    assert rows(adapters) == set()


def test_a_file_of_another_format_beside_an_adapter_is_named(tmp_path: Path) -> None:
    factors = {
        "base_model.model.h.0.q.lora_A.weight": torch.ones(2, 5),
        "base_model.model.h.0.q.lora_B.weight": torch.ones(4, 2),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"h.1.q.lokr_w1": torch.ones(2, 2), "h.1.q.lokr_w2": torch.ones(2, 2)}, tmp_path / "lokr.safetensors")
    adapters = AdapterSet.load(tmp_path)
    (entry,) = adapters.left_out
    assert (Path(entry.file).name, entry.tensor) == ("lokr.safetensors", "")
    assert any("lokr.safetensors" in notice for notice in adapters.notices)
