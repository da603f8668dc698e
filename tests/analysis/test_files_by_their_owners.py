"""Files that peft and transformers write themselves, shards, several adapters and vision-language models among them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis import AdapterSet, AdapterTables, Checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def stir(model: nn.Module, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))


def deltas(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Layer to the change of its weight, (outputs, inputs), that PEFT itself computes."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: module.get_delta_weight(adapter).detach().double() for name, module in layers.items()}


def assert_updates(adapters: AdapterSet, task: str, expected: Mapping[str, Tensor]) -> None:
    assert set(adapters.layers) == set(expected)
    for _, layer, left, right in adapters.read(task, adapters.layers):
        dense = left.double() @ right.double().mT
        assert torch.linalg.norm(dense - expected[layer]) <= 1e-5 * torch.linalg.norm(expected[layer])


def test_shards_of_an_adapter_that_transformers_writes(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    stir(model)
    model.save_pretrained(tmp_path / "task", max_shard_size="1KB")
    assert len(list((tmp_path / "task").glob("*.safetensors"))) > 1
    assert_updates(AdapterSet.load(tmp_path / "task"), "task", deltas(model, "default"))


def test_shards_of_checkpoints_that_transformers_writes(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "tuned", max_shard_size="4KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    adapters = AdapterSet.load(tmp_path / "tuned", base=tmp_path / "base")
    name = "model.layers.1.mlp.up_proj"
    after = model.state_dict()[f"{name}.weight"]
    assert_updates(adapters, "tuned", {name: (after - before[f"{name}.weight"]).double()})
    left_out = AdapterTables(adapters).left_out
    assert left_out[["tensor", "reason"]].to_numpy().tolist() == [["model.norm.weight", "differs and is no matrix"]]


def test_several_adapters_that_peft_writes_into_one_folder(tmp_path: Path) -> None:
    first = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(llama(), first)
    adapted.add_adapter("later", peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj"]))
    stir(adapted)
    adapted.save_pretrained(tmp_path / "all")
    adapters = AdapterSet.load(tmp_path / "all")
    assert adapters.tasks == ("all", "later")
    for task, name in (("all", "default"), ("later", "later")):
        assert_updates(adapters, task, deltas(adapted.base_model.model, name))
    (entry,) = [each for each in adapters.left_out if each.tensor]
    assert (entry.task, entry.reason) == ("all", "module saved in full (modules_to_save)")
    assert entry.tensor.endswith("lm_head.weight")


def test_dora_of_a_vision_language_model_finds_its_base_by_the_names_in_the_file(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=31,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    options = {"r": 2, "use_dora": True, "target_modules": r".*(language_model|vision_tower).*\.q_proj"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    stir(adapted)
    adapted.save_pretrained(tmp_path / "task")
    adapters = AdapterSet.load(tmp_path / "task", base=tmp_path / "base")
    before = {
        name: module.base_layer.weight.detach().clone()
        for name, module in adapted.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    after = adapted.merge_and_unload().state_dict()
    assert len(adapters.layers) == 4  # two blocks of each tower
    for _, layer, left, right in adapters:
        change = (after[f"{layer}.weight"] - before[layer]).double()
        # merging rounds W + ΔW to float32: the change is known to 1e-6 of the weight
        torch.testing.assert_close(left.double() @ right.double().mT, change, rtol=0, atol=1e-6)


VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "intermediate_size": 24, "image_size": 8, "patch_size": 4}
SECTIONS = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2VL": {
        "text_config": TEXT | {"rope_scaling": SECTIONS, "bos_token_id": 1, "eos_token_id": 2},
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    },
    "PaliGemma": {
        "vision_config": SIGLIP,
        "text_config": TEXT | {"model_type": "gemma", "head_dim": 8},
        "projection_dim": 16,
    },
    "Mistral3": {
        "vision_config": SIGLIP | {"model_type": "pixtral"},
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 8},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_a_vision_language_model_is_found_in_its_file(tmp_path: Path, name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint.load(tmp_path / "base")
    matrices = {layer: module.weight for layer, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices.pop("lm_head")  # tied to the embedding, so not in the file
    names = {layer: checkpoint.name_of(layer) for layer in matrices}
    assert len(set(names.values())) == len(names) > 10
    assert any(own != f"{layer}.weight" for layer, own in names.items())
    for layer, weight in matrices.items():
        assert torch.equal(checkpoint.weight(layer, tuple(weight.shape)), weight)


def test_a_mixture_of_formats_is_one_sequence(tmp_path: Path) -> None:
    """A folder of PEFT, a file under another name of the wrappers, and a dense checkpoint on the same base."""
    from safetensors.torch import load_file, save_file

    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    stir(adapted)
    adapted.save_pretrained(tmp_path / "folder")
    expected = deltas(adapted.base_model.model, "default")
    tensors = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    save_file(
        {
            f"module.{name}".replace("lora_A.weight", "lora_A.default.weight"): value.clone()
            for name, value in tensors.items()
        },
        tmp_path / "state.safetensors",
    )
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    paths = [tmp_path / "folder", tmp_path / "state.safetensors", tmp_path / "merged"]
    adapters = AdapterSet.load(*paths, base=tmp_path / "base", alpha=4, common=True)
    assert (adapters.tasks, adapters.kinds) == (("folder", "state", "merged"), ("lora", "lora", "dense"))
    for task in ("folder", "state"):
        assert_updates(adapters, task, expected)
    table = AdapterTables(adapters).interference.query("metric == 'alignment' and layer == 'total'")
    assert table["value"].tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
