"""LoRA in one file: names of PEFT, of diffusers, and of training states; alpha, and the configuration beside it."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import AdapterSet

R, M, N = 2, 4, 5


def factors(seed: int, *, m: int = M, n: int = N) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(R, n, generator=draw), torch.randn(m, R, generator=draw)


def assert_update(adapters: AdapterSet, layer: str, dense: Tensor) -> None:
    left, right = adapters.factors(adapters.tasks[0], layer)
    twin = left.double() @ right.double().mT
    assert torch.linalg.norm(twin - dense.double()) <= 1e-5 * torch.linalg.norm(dense.double())


@pytest.mark.parametrize(
    ("stem", "down", "up", "layer"),
    [
        ("unet.mid.attn1.processor.to_q_lora", "down.weight", "up.weight", "unet.mid.attn1.to_q"),
        ("unet.mid.attn1.processor.to_out_lora", "down.weight", "up.weight", "unet.mid.attn1.to_out.0"),
        ("unet.mid.attn1.to_k.lora", "down.weight", "up.weight", "unet.mid.attn1.to_k"),
        ("down_blocks.0.attn1.processor.to_v_lora", "down.weight", "up.weight", "down_blocks.0.attn1.to_v"),
        ("text_encoder.h.0.self_attn.to_q_lora", "down.weight", "up.weight", "text_encoder.h.0.self_attn.q_proj"),
        (
            "text_encoder.h.0.self_attn.q_proj.lora_linear_layer",
            "down.weight",
            "up.weight",
            "text_encoder.h.0.self_attn.q_proj",
        ),
        ("transformer.blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight", "transformer.blocks.0.attn.to_q"),
        ("diffusion_model.blocks.0.attn.q", "lora_A.weight", "lora_B.weight", "diffusion_model.blocks.0.attn.q"),
        ("diffusion_model.blocks.0.attn.q", "lora_down.weight", "lora_up.weight", "diffusion_model.blocks.0.attn.q"),
    ],
)
def test_files_of_diffusers_without_alpha_have_scaling_one(
    tmp_path: Path, stem: str, down: str, up: str, layer: str
) -> None:
    a, b = factors(0)
    path = tmp_path / "style.safetensors"
    save_file({f"{stem}.{down}": a, f"{stem}.{up}": b}, path)
    adapters = AdapterSet.load(path)
    assert adapters.layers == (layer,)
    (notice,) = adapters.notices
    assert "alpha is missing for 1 of 1 layers: scaling 1" in notice
    assert_update(adapters, layer, b @ a)
    assert_update(AdapterSet.load(path, alpha=6), layer, 3 * b @ a)  # a given alpha is used


def test_a_training_state_of_peft_names_its_adapter(tmp_path: Path) -> None:
    a, b = factors(1)
    tensors = {"base_model.model.h.q.lora_A.first.weight": a, "base_model.model.h.q.lora_B.first.weight": b}
    torch.save(tensors, tmp_path / "state.bin")
    assert_update(AdapterSet.load(tmp_path / "state.bin", alpha=2 * R), "h.q", 2 * b @ a)
    save_file(
        tensors | {name.replace("first", "second"): value + 1 for name, value in tensors.items()},
        tmp_path / "both.safetensors",
    )
    with pytest.raises(ValueError, match=r"both\.safetensors holds several adapters, first, second: save each"):
        AdapterSet.load(tmp_path / "both.safetensors", alpha=4)


def test_biases_are_left_out_by_name(tmp_path: Path) -> None:
    a, b = factors(2)
    tensors = {"unet.q.lora_A.weight": a, "unet.q.lora_B.weight": b, "unet.q.lora_B.bias": torch.ones(M)}
    save_file(tensors, tmp_path / "style.safetensors")
    adapters = AdapterSet.load(tmp_path / "style.safetensors")
    assert [(each.tensor, each.reason) for each in adapters.left_out] == [("unet.q.lora_B.bias", "bias or norm")]
    assert_update(adapters, "unet.q", b @ a)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(N, M)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def saved_by_peft(folder: Path, **options: object) -> Tensor:
    """A folder written by PEFT, and the change of the weight that PEFT merges."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Model()
    before = model.q.weight.detach().clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=7, target_modules=["q"], **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    layer = adapted.base_model.model.q
    delta = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(adapted.merge_and_unload().q.weight - before, delta, rtol=0, atol=1e-5)
    return delta


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "my-lora.safetensors"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_file_of_peft_finds_its_configuration_under_any_name(tmp_path: Path, name: str, given: str) -> None:
    folder = tmp_path / "task"
    dense = saved_by_peft(folder)
    (folder / "adapter_model.safetensors").rename(folder / name)
    adapters = AdapterSet.load(folder / name if given == "file" else folder)
    assert (adapters.tasks, adapters.layers) == (("task",), ("q",))
    assert [name in notice for notice in adapters.notices] == [True] * (name == "my-lora.safetensors")
    assert_update(adapters, "q", dense)


def test_a_second_file_beside_the_usual_one_has_no_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    saved_by_peft(folder)
    (folder / "other.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"other\.safetensors: alpha is missing for 1 of 1 layers"):
        AdapterSet.load(folder / "other.safetensors")


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes the bias for an incomplete factor
def test_a_trained_bias_of_the_factors_is_left_out_by_name(tmp_path: Path) -> None:
    dense = saved_by_peft(tmp_path / "task", lora_bias=True)
    adapters = AdapterSet.load(tmp_path / "task")
    assert_update(adapters, "q", dense)
    assert [(each.tensor, each.reason) for each in adapters.left_out] == [("base_model.model.q.lora_B.bias", "bias")]


@pytest.mark.slow  # importing diffusers takes half a minute on a busy machine
@pytest.mark.parametrize("form", ["peft", "diffusers", "metadata"])
def test_files_of_diffusers_hold_what_diffusers_adds(tmp_path: Path, form: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    unet, again = (
        diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=12, **sizes, **blocks) for _ in range(2)
    )
    targets = ["to_q", "to_k", "to_v", "to_out.0"] + ["conv1"] * (form != "diffusers")
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    tensors = peft.get_peft_model_state_dict(unet)
    if form == "diffusers":
        tensors = diffusers.utils.convert_state_dict_to_diffusers(tensors)
    metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()} if form == "metadata" else {}
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    mixin.save_lora_weights(tmp_path, unet_lora_layers=tensors, **metadata)
    state, options = (
        mixin.lora_state_dict(tmp_path, return_lora_metadata=True)[0::2]
        if form == "metadata"
        else (mixin.lora_state_dict(tmp_path)[0], None)
    )
    mixin.load_lora_into_unet(state, None, again, adapter_name="default", metadata=options)
    adapters = AdapterSet.load(tmp_path / "pytorch_lora_weights.safetensors")
    layers = {name: module for name, module in again.named_modules() if hasattr(module, "get_delta_weight")}
    assert {f"unet.{name}" for name in layers} == set(adapters.layers)
    for name, module in layers.items():
        assert_update(adapters, f"unet.{name}", module.get_delta_weight("default").detach().flatten(1))


ODD = (
    *(torch.zeros(0), torch.zeros(()), torch.full((2, 2), float("nan")), torch.ones(3, dtype=torch.int64)),
    *(torch.ones(1, 1, 1), torch.zeros(0, 5), torch.ones(6, 5), torch.ones(2, dtype=torch.complex64)),
)


def damaged(tensors: dict[str, Tensor], draw: random.Random) -> None:
    """Drop, replace, copy or rename one of the tensors."""
    name = draw.choice(sorted(tensors))
    kind = draw.randrange(4)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = draw.choice(ODD)
    else:
        tensors[f"module.{name}" if kind == 2 else f"{name}.extra"] = tensors[name].clone()


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_refused_or_read_without_their_damage(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    experts = seed % 2 == 0
    if experts:
        sizes = {"experts.base_layer": (2 * M, N), "experts": (N, M)}
        parts = {f"base_model.model.{stem}": (factors(seed, m=m, n=n)) for stem, (m, n) in sizes.items()}
        tensors = {f"{stem}.lora_A.weight": a.repeat(3, 1) for stem, (a, _) in parts.items()}
        tensors |= {f"{stem}.lora_B.weight": b.repeat(1, 3) for stem, (_, b) in parts.items()}
        targets = draw.choice([["experts.gate_up_proj", "experts.down_proj"], ["experts.w1"], "experts", [3], None])
        config = {"peft_type": "LORA", "r": draw.choice([R, R, 4, 0]), "lora_alpha": 4, "target_parameters": targets}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        stems = {
            "unet.a.processor.to_q_lora": ("down", "up"),
            "unet.b": ("lora_A", "lora_B"),
            "unet.c": ("lora_A.x", "lora_B.x"),
        }
        tensors = {
            f"{stem}.{part}.weight": value.clone()
            for stem, names in stems.items()
            for part, value in zip(names, factors(seed), strict=True)
        }
    whole = {name: value.clone() for name, value in tensors.items()}
    damaged(tensors, draw)
    path = tmp_path / ("adapter_model.safetensors" if experts else "style.safetensors")
    save_file(tensors, path)
    message = None
    try:
        adapters = AdapterSet.load(tmp_path)
        updates = {layer: left @ right.T for _, layer, left, right in adapters}
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    if message is not None:
        assert str(tmp_path) in message  # the file is named
    else:
        assert updates
        assert tensors.keys() - whole.keys() <= {each.tensor for each in adapters.left_out}
