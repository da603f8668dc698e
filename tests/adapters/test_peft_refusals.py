"""Configurations, memories, models and versions that the PEFT method refuses by name."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_peft import config
from tiny_models import llama
from torch import nn

from manifold_cl import eblora_adapters, export_lora, inject_adapters
from manifold_cl.adapters import eblora_layers, protect
from manifold_cl.adapters.peft import EBLoraConfig
from manifold_cl.adapters.peft_config import validate_version
from manifold_cl.files import FileError


def test_an_adapter_of_another_model_is_refused_with_layer_and_remedy(tmp_path: Path) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    message = (
        r"layers\.0\.self_attn\.q_proj: the adapter was trained on another model, its base weight differs by up to "
        r".*base_fingerprint = None loads it nevertheless"
    )
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(llama(seed=9), tmp_path)
    again = EBLoraConfig.from_pretrained(tmp_path)
    again.base_fingerprint = None
    PeftModel.from_pretrained(llama(seed=9), tmp_path, config=again)
    PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path)  # the same model, rounded
    fresh = config()
    for seed in (0, 1):  # one configuration for several models is no mistake
        get_peft_model(llama(seed=seed), fresh)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, TypeError, r"embed_tokens: adapters wrap linear layers, got Embedding"),
        ({"target_modules": ["mlp"]}, TypeError, r"mlp: adapters wrap nn\.Linear \(or GPT-2's Conv1D\), got LlamaMLP"),
        ({"target_modules": ["nothing"]}, ValueError, "nothing"),
        (
            {"r": 33},
            ValueError,
            r"^model\.layers\.0\.self_attn\.q_proj: rank 33 does not fit a weight of shape \(32, 32\): choose 1 to 32",
        ),
        ({"core": "dense"}, ValueError, "core is one of scalar, diagonal, full, got 'dense'"),
        ({"start": "gradient"}, ValueError, "start is one of random, pretrained, task, got 'gradient'"),
        ({"alpha": 0.0}, ValueError, "alpha is 0"),
        ({"dropout": 1.0}, ValueError, r"dropout is a share in \[0, 1\), got 1\.0"),
        ({"retraction": "cubic"}, ValueError, "cubic"),
        ({"layers_pattern": "layers"}, ValueError, "layers_pattern names the list that layers_to_transform counts in"),
    ],
)
def test_bad_configurations_are_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(llama(), config(**options))


def test_a_memory_that_does_not_fit_is_refused_by_layer_and_changes_nothing() -> None:
    model = get_peft_model(llama(), config())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=rf"^{name}: complement leaves 2 free directions in R\^32, too few for rank 4"):
        protect(model, {name: torch.eye(32)[:, :30]}, strict=False)
    with pytest.raises(
        ValueError, match=r"no adapted layer 'lm_head'; there are model\.layers\.0\.self_attn\.q_proj, "
    ):
        protect(model, {"lm_head": torch.eye(32)[:, :3]})
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_damaged_adapters_are_not_merged_safely() -> None:
    model = get_peft_model(llama(), config())
    layer = next(iter(eblora_layers(model).values()))
    with torch.no_grad():
        layer.eblora_scale["default"].fill_(float("nan"))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="merging default gives NaN or infinite weights: the adapter is damaged"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "1.0.0"])
def test_an_untested_peft_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(ImportError, match=rf"tested with peft >= 0\.21\.0, < 0\.22, found {version}: pip install"):
        validate_version(version)
    validate_version(peft.__version__)
    validate_version("0.21.0")


def test_a_layer_that_its_parent_reads_past_is_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(ValueError, match=r"0\.linear1: linear1 is inside nn\.TransformerEncoderLayer"):
        get_peft_model(model, config(target_modules=["linear1"]))


def test_adapters_are_not_injected_beside_those_of_peft() -> None:
    """They would freeze PEFT's, and the folder of neither could hold both."""
    model = get_peft_model(llama(), config(target_modules=["q_proj"]))
    message = r"self_attn\.q_proj carries PEFT's adapters, .* base model, or what model\.merge_and_unload\(\) returns"
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, ["o_proj"], eblora_adapters(rank=2))
    inject_adapters(model.merge_and_unload(), ["o_proj"], eblora_adapters(rank=2))


def test_an_adapter_that_is_plain_lora_is_not_exported_again(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'default' is plain LoRA already: call model\.save_pretrained\(folder\)"):
        export_lora(model, tmp_path / "out")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="holds plain LoRA already"):
        export_lora(tmp_path, tmp_path / "out")
