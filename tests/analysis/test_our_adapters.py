"""What our own layers write is what the analysis reads: every core, with and without a compensated start."""

import json

import pytest
import torch
from torch import nn

from analysis import AdapterSet, spectrum_table
from manifold_cl import adapters_of, eblora_adapters, inject_adapters, save_adapters


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
    import json

    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "EBLORA", "r": 2}))
    save_file({"base_model.model.x.eblora_left": torch.ones(4, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="x needs eblora_left"):
        AdapterSet.load(tmp_path)
    save_file({"other": torch.ones(4, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no eblora_left tensors"):
        AdapterSet.load(tmp_path)


@pytest.mark.parametrize("scaling", [10**400, None, "2", True])
def test_a_scaling_that_is_no_finite_number_is_refused_by_file(scaling, tmp_path):
    save_adapters(trained("scalar", compensate=False), tmp_path / "one", task="one")
    path = tmp_path / "one" / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling": scaling}))
    with pytest.raises(ValueError, match=r"one/adapter\.json: 'scaling' is .*, a finite number was expected"):
        AdapterSet.load(tmp_path / "one")
