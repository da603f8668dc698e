"""EBLoRA in PEFT around compiled bases: files name layers as the base model does."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manifold_cl.adapters import eblora_layers, protect
from manifold_cl.adapters.peft import EBLoraConfig


def base(*, seed: int = 0) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return model


def inputs() -> Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


def adapted(model: nn.Module) -> PeftModel:
    made = get_peft_model(model, EBLoraConfig(r=2, target_modules=["0", "2"], initial_scale=1.5, seed=3))
    draw = torch.Generator().manual_seed(2)
    protect(made, {name: torch.linalg.qr(torch.randn(n, 3, generator=draw)).Q for name, n in (("0", 10), ("2", 8))})
    return made


@pytest.mark.slow
@pytest.mark.parametrize("saved_compiled", [True, False])
@pytest.mark.parametrize("loaded_compiled", [True, False])
def test_adapters_move_between_compiled_and_plain_bases(
    tmp_path: Path, saved_compiled: bool, loaded_compiled: bool
) -> None:
    def wrapped(model: nn.Module, compiled: bool) -> nn.Module:
        return torch.compile(model, backend="eager") if compiled else model

    model = adapted(wrapped(base(), saved_compiled))
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "_orig_mod" in key]
    loaded = PeftModel.from_pretrained(wrapped(base(), loaded_compiled), tmp_path)
    torch.testing.assert_close(loaded(inputs()), model(inputs()), rtol=0, atol=0)
    assert [layer.manifolds("default")[1].k for layer in eblora_layers(loaded).values()] == [3, 3]


def test_a_compiled_base_is_compared_with_the_saved_one(tmp_path: Path) -> None:
    adapted(base()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="0: the adapter was trained on another model"):
        PeftModel.from_pretrained(torch.compile(base(seed=9), backend="eager"), tmp_path)


def test_files_with_names_of_wrappers_load(tmp_path: Path) -> None:
    model = adapted(base())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    old = {key.replace("model.model.", "model.model._orig_mod."): value for key, value in load_file(path).items()}
    save_file(old, path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(inputs()), model(inputs()), rtol=0, atol=0)


def test_a_file_that_lacks_a_layer_is_refused_by_name(tmp_path: Path) -> None:
    adapted(base()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if ".2." not in key}, path)
    with pytest.raises(ValueError, match="no adapter for 2"):
        PeftModel.from_pretrained(base(), tmp_path)
