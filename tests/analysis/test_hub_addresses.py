"""Repositories of the hub are read from the cache of huggingface_hub, and named where they are not there."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analysis import AdapterSet, Checkpoint
from analysis.formats.hub import from_hub

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def repository(cache: Path, name: str) -> Path:
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    return place / "snapshots" / COMMIT


def lora(folder: Path, value: float = 1.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = "base_model.model.q.lora_"
    tensors = {f"{stem}A.weight": torch.full((2, 5), value), f"{stem}B.weight": torch.ones(4, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))


@pytest.mark.parametrize("form", ["hf://owner/name", "hf://owner/name@main", Path("hf://owner/name")])
def test_a_repository_is_a_task_of_its_name(cache: Path, form: str | Path) -> None:
    lora(repository(cache, "owner/name"))
    adapters = AdapterSet.load(form)
    assert (adapters.tasks, adapters.layers) == (("name",), ("q",))
    assert adapters.notices == (f"name: read from hf://owner/name at commit {COMMIT[:12]}",)
    torch.testing.assert_close(adapters.factors("name", "q")[1], torch.ones(5, 2))


def test_folders_and_files_inside_a_repository_are_read(cache: Path) -> None:
    place = repository(cache, "owner/name")
    lora(place / "step-5", 3.0)
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    save_file({"unet.q.lora_A.weight": a, "unet.q.lora_B.weight": b}, place / "style.safetensors")
    assert AdapterSet.load("hf://owner/name/step-5").tasks == ("step-5",)
    assert AdapterSet.load("hf://owner/name/style.safetensors").tasks == ("style",)
    with pytest.raises(FileNotFoundError, match=r"hf://owner/name/step-6: .* holds no step-6"):
        AdapterSet.load("hf://owner/name/step-6")


def test_two_owners_of_one_name_are_two_tasks(cache: Path) -> None:
    for owner in ("one", "two"):
        lora(repository(cache, f"{owner}/name"))
    assert AdapterSet.load("hf://one/name", "hf://two/name").tasks == ("one/name", "two/name")


def test_a_base_model_is_read_from_the_hub(cache: Path) -> None:
    save_file({"q.weight": torch.ones(4, 5)}, repository(cache, "owner/base") / "model.safetensors")
    assert Checkpoint.load("hf://owner/base").shapes == {"q.weight": (4, 5)}


def test_what_is_missing_without_a_network_is_named(cache: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"hf://owner/absent is not in the cache .*hub.*: run 'hf download owner/absent'"
    ):
        AdapterSet.load("hf://owner/absent")
    with pytest.raises(FileNotFoundError, match="hf download owner/absent --revision v2"):
        AdapterSet.load("hf://owner/absent@v2")
    with pytest.raises(ValueError, match=r"hf:/+owner is no address on the hub"):
        AdapterSet.load("hf://owner")


def test_the_extra_is_named_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"hf://owner/name needs huggingface_hub: pip install 'huggingface"):
        from_hub("hf://owner/name")
