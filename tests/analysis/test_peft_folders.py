"""The update read from a PEFT folder is the update that PEFT itself merges."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from analysis import AdapterSet

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(10, 12), "v": nn.Linear(10, 7)}) for _ in range(2)])
        self.head = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class TransposedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = pytorch_utils.Conv1D(12, 10)  # its weight is stored (in, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("weight")}


def train(model: nn.Module) -> None:
    """Any non-zero factors will do; PEFT starts with B = 0."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rank_stabilisation_are_those_of_peft(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    model = Model()
    before = weights(model)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q", "v", "head"],
        use_rslora=rslora,
        rank_pattern={"layers.1.q": 2, "v": 3},
        alpha_pattern={r"layers\.\d\.q": 5, "head": 1},
    )
    adapted = peft.get_peft_model(model, config)
    train(adapted)
    adapted.save_pretrained(tmp_path / "task")
    after = weights(adapted.merge_and_unload())
    adapters = AdapterSet.load(tmp_path / "task")
    assert adapters.layers == ("head", "layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
    assert [adapters.shape("task", layer)[2] for layer in adapters.layers] == [4, 4, 3, 2, 3]
    for _, layer, left, right in adapters:
        # merging rounds W + ΔW to float32, entries of a few units: 1e-6 is two roundings
        torch.testing.assert_close(
            left @ right.T, after[f"{layer}.weight"] - before[f"{layer}.weight"], rtol=0, atol=3e-6
        )


def test_weights_stored_transposed_give_updates_as_out_times_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TransposedModel()
    before = weights(model)["c_attn.weight"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, config)
    train(adapted)
    adapted.save_pretrained(tmp_path / "task")
    after = weights(adapted.merge_and_unload())["c_attn.weight"]
    left, right = AdapterSet.load(tmp_path / "task").factors("task", "c_attn")
    assert (left.shape, right.shape) == ((12, 3), (10, 3))
    torch.testing.assert_close((left @ right.T).T, after - before, rtol=0, atol=3e-6)  # rounding, as above
