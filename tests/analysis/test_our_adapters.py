"""What our own layers write is what the analysis reads: every core, with and without a compensated start."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from analysis import AdapterSet, spectrum_table
from manifold_cl import adapters_of, eblora_adapters, inject_adapters, save_adapters
from manifold_cl.tensor_files import read_tensors, write_tensors

VERSION_1 = Path(__file__).parents[1] / "version_1"


def trained(core, *, compensate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 9))
    draw = torch.Generator().manual_seed(1)
    options = {"core": core, "compensate": compensate, "initial_scale": 0.5, "alpha": 6.0}
    inject_adapters(model, ["0", "1"], eblora_adapters(rank=3, generator=draw, **options))
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.scale += 0.1 * torch.randn(adapter.scale.shape, generator=draw)
            adapter.left.copy_(adapter.left_manifold.random(*adapter.left.shape, generator=draw))
    return model


@pytest.mark.parametrize("core", ["scalar", "diagonal", "full"])
@pytest.mark.parametrize("compensate", [False, True])
def test_the_update_read_is_the_update_saved(core, compensate, tmp_path):
    model = trained(core, compensate=compensate)
    save_adapters(model, tmp_path / "one", task="one")
    adapters = AdapterSet.load(tmp_path / "one")
    for name, adapter in adapters_of(model).items():
        left, right = adapters.factors("one", name)
        expected = adapter.factors().delta_weight()
        torch.testing.assert_close(left @ right.mT, expected, rtol=0, atol=1e-6)  # float32 sums of six terms
    assert len(spectrum_table(adapters)) > 0


@pytest.mark.parametrize("core", ["scalar", "full"])
@pytest.mark.parametrize("compensate", [False, True])
def test_a_folder_of_our_peft_method_is_read_like_any_other(core, compensate, tmp_path):
    pytest.importorskip("peft")
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from manifold_cl.adapters.peft import EBLoraConfig

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **size))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = EBLoraConfig(
        r=3, alpha=6, target_modules=["q_proj", "down_proj"], core=core, compensate=compensate, initial_scale=0.3
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "eblora_scale" in name:
                p += 0.1
    wrapped.save_pretrained(tmp_path / "one")
    adapters = AdapterSet.load(tmp_path / "one")
    merged = dict(wrapped.merge_and_unload().named_parameters())
    assert len(adapters.layers) == 2
    for layer in adapters.layers:
        left, right = adapters.factors(adapters.tasks[0], layer)
        change = merged[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(left @ right.mT, change, rtol=0, atol=1e-6)  # float32 sums, once into the weight


def test_a_folder_of_our_peft_method_without_its_parts_is_refused(tmp_path):

    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "EBLORA", "r": 2}))
    save_file({"base_model.model.x.eblora_left": torch.ones(4, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="x needs eblora_left"):
        AdapterSet.load(tmp_path)
    save_file({"other": torch.ones(4, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no eblora_left"):
        AdapterSet.load(tmp_path)


@pytest.mark.parametrize("value", [10**400, None, "2", True])
def test_a_number_that_is_not_finite_is_refused_by_file(value, tmp_path):
    path = tmp_path / "one" / "adapter.safetensors"
    write_tensors(path, {"x.left": torch.ones(3, 2), "x.right": torch.ones(4, 2)}, {"alpha": value, "rank": 2})
    with pytest.raises(ValueError, match=r"one/adapter\.safetensors: 'alpha' is .*, a finite number was expected"):
        AdapterSet.load(tmp_path / "one")


def test_every_flipped_byte_of_an_adapter_is_found(tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_tensors(path, {"x.left": torch.ones(3, 1), "x.right": torch.ones(4, 1)}, {"alpha": 1.0, "rank": 1})
    assert AdapterSet.load(path).layers == ("x",)
    content = path.read_bytes()
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises((ValueError, OSError), match=r"adapter\.safetensors"):
            AdapterSet.load(path)


def test_adapters_of_a_later_version_are_refused_by_name(tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_tensors(path, {"x.left": torch.ones(3, 1), "x.right": torch.ones(4, 1)}, {"version": 3})
    with pytest.raises(ValueError, match=r"adapter\.safetensors: version 3 of manifold_cl\.adapter .*versions 1 to 2"):
        AdapterSet.load(path)


def test_folders_of_version_1_are_read_like_those_of_version_2(tmp_path):
    run = shutil.copytree(VERSION_1 / "eblora", tmp_path / "eblora")
    old = AdapterSet.load(run)
    for task in ("01-first", "02-second"):
        for name in ("adapter", "memory"):
            path = run / "tasks" / task / f"{name}.safetensors"
            tensors, manifest = read_tensors(path)
            write_tensors(path, tensors, {**manifest, "version": 2})
    new = AdapterSet.load(run)
    assert (new.tasks, new.layers, new.kinds) == (old.tasks, old.layers, old.kinds)
    for (_, layer, *before), (_, other, *after) in zip(old, new, strict=True):
        assert layer == other
        assert all(map(torch.equal, before, after))
    assert torch.equal(new.protected("second", "inner"), old.protected("second", "inner"))
    assert AdapterSet.load(VERSION_1 / "full_core").layers == ("inner",)
