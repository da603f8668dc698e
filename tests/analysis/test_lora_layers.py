"""LoRA of convolutions and attention modules as PEFT writes it, and single files with more than pairs of factors."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import AdapterSet
from analysis.changes import write_changed
from analysis.formats import Checkpoint

peft = pytest.importorskip("peft")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane, self.space = nn.Conv1d(8, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(2, 3, 2)
        self.point, self.grouped = nn.Conv2d(6, 6, 1), nn.Conv2d(4, 8, 3, groups=2)
        self.attention, self.q, self.embed = nn.MultiheadAttention(8, 2), nn.Linear(8, 5), nn.Embedding(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.embed(x))


KERNELS = ["line", "plane", "space", "point"]


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, lora_alpha=3, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def weights(model: Any) -> dict[str, Tensor]:
    """The base model's tensors in float64, by their names without PEFT."""
    state = model.get_base_model().double().state_dict()
    return {name.replace(".base_layer", ""): value.clone() for name, value in state.items() if "lora_" not in name}


def changes(model: Any) -> dict[str, Tensor]:
    """Layer to what PEFT's merge adds to its weight, as a matrix in float64; biases by their names."""
    before = weights(model)
    after = model.double().merge_and_unload().state_dict()
    changed = {name: value - before[name] for name, value in after.items() if not torch.equal(value, before[name])}
    return {
        name.removesuffix(".weight"): value.flatten(1) if value.ndim > 1 else value for name, value in changed.items()
    }


def assert_updates(adapters: AdapterSet, expected: Mapping[str, Tensor]) -> None:
    assert set(adapters.layers) == set(expected)
    for _, layer, left, right in adapters:
        error = torch.linalg.norm(left.double() @ right.double().mT - expected[layer])
        assert error <= 1e-5 * torch.linalg.norm(expected[layer]), layer


def loaded(folder: Path) -> dict[str, Tensor]:
    """What PEFT's merge adds to a model into which it loads a folder, without a warning about its tensors."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return changes(peft.PeftModel.from_pretrained(Model(), folder))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_of_peft_are_matrices_and_are_saved_as_convolutions(tmp_path: Path, dora: bool) -> None:
    model = adapted(target_modules=KERNELS, use_dora=dora, rank_pattern={"plane": 3})
    model.save_pretrained(tmp_path / "task")
    save_file({name: value.float() for name, value in weights(model).items()}, tmp_path / "base.safetensors")
    expected = changes(model.float())
    adapters = AdapterSet.load(tmp_path / "task", base=tmp_path / "base.safetensors")
    assert_updates(adapters, expected)
    for folder in (adapters.save(tmp_path / "saved") / "01-task", tmp_path / "changed"):
        if folder.name == "changed":
            write_changed(folder, adapters, adapters)
        again = loaded(folder)
        for layer in KERNELS:
            torch.testing.assert_close(again[layer], expected[layer], rtol=0, atol=1e-5)


def test_convolutions_in_groups_are_refused_by_name(tmp_path: Path) -> None:
    adapted(target_modules=["grouped"]).save_pretrained(tmp_path / "task")
    with pytest.raises(ValueError, match=r"grouped\.lora_B\.weight is of a convolution in 2 groups"):
        AdapterSet.load(tmp_path / "task")


def test_attention_modules_are_what_peft_merges(tmp_path: Path) -> None:
    model = adapted(target_modules=["attention"], rank_pattern={"attention": 3}, alpha_pattern={"attention": 11})
    model.save_pretrained(tmp_path / "task")
    save_file({name: value.float() for name, value in weights(model).items()}, tmp_path / "base.safetensors")
    expected = changes(model.float())
    names = {"attention": "attention.in_proj_weight", "attention.base_layer.out_proj": "attention.out_proj"}
    adapters = AdapterSet.load(tmp_path / "task")
    assert_updates(adapters, {layer: expected[name] for layer, name in names.items()})
    base = Checkpoint.load(tmp_path / "base.safetensors")
    assert [base.weight(layer, adapters.shape("task", layer)[:2]).shape for layer in names] == [(24, 8), (8, 8)]
    with pytest.warns(UserWarning, match="out_proj in a MultiheadAttention twice"):
        adapters.save(tmp_path / "saved")
    again = loaded(tmp_path / "saved" / "01-task")
    for name in names.values():
        torch.testing.assert_close(again[name], expected[name], rtol=0, atol=1e-5)


def test_biases_of_factors_are_kept_with_their_scaling(tmp_path: Path) -> None:
    model = adapted(target_modules=["q"], lora_bias=True)
    with warnings.catch_warnings():  # PEFT wonders about a factor of one dimension
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "task")
    expected = changes(model)
    assert "q.bias" in expected
    adapters = AdapterSet.load(tmp_path / "task")
    write_changed(tmp_path / "changed", adapters, adapters)
    again = loaded(tmp_path / "changed")
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-5)


def test_single_files_with_magnitudes_are_dora(tmp_path: Path) -> None:
    model = adapted(target_modules=["q", "plane"], use_dora=True)
    tensors = peft.get_peft_model_state_dict(model)
    save_file({name: value.float() for name, value in weights(model).items()}, tmp_path / "base.safetensors")
    expected = changes(model.float())
    named = {name.replace("base_model.model.", "unet."): value.float() for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in named.items()}, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"style\.safetensors: DoRA's update depends on the base weight"):
        AdapterSet.load(tmp_path / "style.safetensors", alpha=3)
    adapters = AdapterSet.load(tmp_path / "style.safetensors", base=tmp_path / "base.safetensors", alpha=3)
    assert adapters.kinds == ("dora",)
    assert_updates(adapters, {f"unet.{layer}": value for layer, value in expected.items()})
    lone = next(name for name in named if "magnitude" in name)
    save_file({name: value for name, value in named.items() if name != lone}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"has no lora_magnitude_vector, 1 layers have one"):
        AdapterSet.load(tmp_path / "odd.safetensors", base=tmp_path / "base.safetensors", alpha=3)


@pytest.mark.parametrize("ending", ["", ".default"])
def test_single_files_hold_embeddings_and_modules_saved_in_full(tmp_path: Path, ending: str) -> None:
    model = adapted(target_modules=["q", "embed"])
    tensors = {}
    for name, value in peft.get_peft_model_state_dict(model).items():
        end = ".weight" if name.endswith(".weight") else ""
        tensors[f"{name.removesuffix(end)}{ending}{end}"] = value.clone()
    expected = changes(model)
    head = {"base_model.model.head.weight": torch.ones(2, 2)}
    save_file(tensors | head, tmp_path / "state.safetensors")
    adapters = AdapterSet.load(tmp_path / "state.safetensors", alpha=3)
    assert adapters.embeddings == adapters.transposed == {"embed"}
    assert_updates(adapters, {"q": expected["q"], "embed": expected["embed"].mT})
    left_out = [(each.tensor, each.reason) for each in adapters.left_out]
    assert left_out == [(*head, "saved in full beside the factors")]
    assert any("base_model.model.head.weight" in notice for notice in adapters.notices)


def test_differences_of_norms_are_no_part_of_a_lora(tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "LayerNorm"]})
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=3, algo="lora", train_norm=True)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network.save_weights(str(tmp_path / "style.safetensors"), torch.float32, {})
    adapters = AdapterSet.load(tmp_path / "style.safetensors")
    assert sorted(each.tensor for each in adapters.left_out) == ["lycoris_1.b_norm", "lycoris_1.w_norm"]
    down, up = network.loras[0].lora_down.weight, network.loras[0].lora_up.weight
    assert_updates(adapters, {"lycoris_0": 1.5 * (up.double() @ down.double()).detach()})


@pytest.mark.parametrize("beside", ["diff", "dora_scale"])
def test_files_of_comfyui_without_alpha_have_scaling_one_whatever_is_beside(tmp_path: Path, beside: str) -> None:
    torch.manual_seed(0)
    stem, up, down, weight = "diffusion_model.blocks.0.q", torch.randn(6, 2), torch.randn(2, 5), torch.randn(6, 5)
    more = {
        "diff": {"diffusion_model.norm.diff": torch.ones(6)},
        "dora_scale": {f"{stem}.dora_scale": torch.ones(6, 1)},
    }
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, **more[beside]}, tmp_path / "a.safetensors"
    )
    save_file({"blocks.0.q.weight": weight}, tmp_path / "base.safetensors")
    adapters = AdapterSet.load(tmp_path / "a.safetensors", base=tmp_path / "base.safetensors")
    dense = up.double() @ down.double()
    if beside == "dora_scale":
        whole = weight.double() + dense
        dense = whole / torch.linalg.vector_norm(whole, dim=1, keepdim=True) - weight
    assert_updates(adapters, {stem: dense})
    assert any("alpha is missing for 1 of 1 layers: scaling 1" in notice for notice in adapters.notices)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["blocks.0.processor.qkv_lora1.down.weight", "blocks.0.processor.qkv_lora1.up.weight"],
            "holds the factors of a",
        ),
        ([], "holds no tensors"),
    ],
)
def test_files_that_are_no_checkpoint_are_not_taken_for_one(tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a\.safetensors {message}"):
        AdapterSet.load(tmp_path / "a.safetensors")
