"""Kohya files, whole or not at all, and folders of folders."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis import AdapterSet


def kohya(path: Path, *, alpha: bool = True, **more: Tensor) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"lora_unet_mid_attn_to_q": ((2, 5), (4, 2)), "lora_unet_conv": ((2, 3, 3, 3), (6, 2, 1, 1))}
    tensors = dict(more)
    for name, (down, up) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(down, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(up, generator=draw)
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, path)
    return tensors


def test_kohya_files_scale_by_alpha_over_rank_and_kernels_are_matrices(tmp_path: Path) -> None:
    stored = kohya(tmp_path / "style.safetensors")
    adapters = AdapterSet.load(tmp_path / "style.safetensors")
    assert (adapters.tasks, adapters.kinds) == (("style",), ("kohya",))
    left, right = adapters.factors("style", "lora_unet_conv")
    up, down = stored["lora_unet_conv.lora_up.weight"], stored["lora_unet_conv.lora_down.weight"]
    kernel = 3.0 * torch.einsum("orij,rchw->ochw", up, down)  # alpha / r = 3, the kernel that is added
    torch.testing.assert_close((left @ right.T).reshape(6, 3, 3, 3), kernel, rtol=1e-5, atol=1e-5)
    assert AdapterSet.load(tmp_path).tasks == (tmp_path.name,)  # a folder with one such file


@pytest.mark.parametrize("stem", ["lora_unet_mid", "diffusion_model.blocks.0.attn.k"])
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("dora_scale", r"holds the magnitudes of a DoRA: not supported: {}; "),
        ("hada_w1_a", r"no w1_b beside {}"),
        ("lokr_w1_a", r"no w1_b beside {}"),
        ("lora_mid.weight", r"no up, down beside {}"),
        ("q_layer.weight", r"not supported: {}"),
        ("weight", r"not supported: {}"),
    ],
)
def test_no_tensor_of_a_kohya_file_is_dropped(tmp_path: Path, stem: str, odd: str, message: str) -> None:
    layer = {"lora_down.weight": torch.ones(2, 5), "lora_up.weight": torch.ones(4, 2), "alpha": torch.ones(())}
    kohya(tmp_path / "whole.safetensors", **{f"{stem}.{part}": tensor for part, tensor in layer.items()})
    assert stem in AdapterSet.load(tmp_path / "whole.safetensors").layers
    kohya(tmp_path / "more.safetensors", **{f"{stem}.{odd}": torch.ones(4, 2)})
    with pytest.raises(ValueError, match=message.format(re.escape(f"{stem}.{odd}"))):
        AdapterSet.load(tmp_path / "more.safetensors")
    kohya(tmp_path / "half.safetensors", **{f"{stem}.lora_up.weight": torch.ones(4, 2)})
    with pytest.raises(ValueError, match=rf"not supported: {re.escape(stem)}\.lora_up\.weight"):
        AdapterSet.load(tmp_path / "half.safetensors")


def test_differences_of_biases_and_norms_are_named(tmp_path: Path) -> None:
    more = {
        "lora_unet_conv.diff_b": torch.ones(6),
        "lora_unet_norm.diff": torch.ones(3),
        "lora_unet_n.w_norm": torch.ones(3),
    }
    plain = kohya(tmp_path / "plain.safetensors")
    kohya(tmp_path / "more.safetensors", **more, **{"lora_unet_k.diff": torch.ones(2, 3)})
    adapters = AdapterSet.load(tmp_path / "more.safetensors")
    (notice,) = adapters.notices
    assert all(name in notice for name in more)
    assert adapters.layers == ("lora_unet_conv", "lora_unet_k", "lora_unet_mid_attn_to_q")
    left, right = adapters.factors("more", "lora_unet_mid_attn_to_q")
    assert torch.equal(left, 3 * plain["lora_unet_mid_attn_to_q.lora_up.weight"])
    left, right = adapters.factors("more", "lora_unet_k")
    assert torch.equal(left @ right.T, torch.ones(2, 3))


def test_kohya_files_without_alpha_are_refused_until_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    stored = kohya(path, alpha=False)
    with pytest.raises(
        ValueError, match=r"alpha is missing for 2 of 2 layers, the first is lora_unet_conv: give alpha="
    ):
        AdapterSet.load(path)
    product = stored["lora_unet_mid_attn_to_q.lora_up.weight"] @ stored["lora_unet_mid_attn_to_q.lora_down.weight"]
    for alpha, scaling in (("rank", 1.0), (4.0, 2.0)):
        left, right = AdapterSet.load(path, alpha=alpha).factors("style", "lora_unet_mid_attn_to_q")
        torch.testing.assert_close(left @ right.T, scaling * product, rtol=1e-5, atol=1e-5)


def dense(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    save_file({"h.0.q.weight": torch.full((4, 3), value)}, folder / "model.safetensors")
    return folder


def test_every_format_may_lie_in_subfolders(tmp_path: Path) -> None:
    base = dense(tmp_path / "dense" / "0-base", 0.0)
    for number in (1, 2, 10):
        dense(tmp_path / "dense" / f"step-{number}", float(number))
        (tmp_path / "kohya" / f"step-{number}").mkdir(parents=True)
        kohya(tmp_path / "kohya" / f"step-{number}" / "style.safetensors")
    (tmp_path / "dense" / "logs").mkdir()
    steps = ("step-1", "step-2", "step-10")
    assert AdapterSet.load(tmp_path / "dense", base=base).tasks == steps  # the base among them is no update
    assert AdapterSet.load(tmp_path / "kohya").tasks == steps
    with pytest.raises(ValueError, match="complete checkpoint: its update is the difference"):
        AdapterSet.load(tmp_path / "dense")
    (tmp_path / "dense" / "step-2" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "dense" / "step-2" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"q": "b.safetensors"}}'
    )
    with pytest.raises(FileNotFoundError, match=r"step-2/b\.safetensors does not exist, though model"):
        AdapterSet.load(tmp_path / "dense", base=base)
    kohya(tmp_path / "kohya" / "step-2" / "other.safetensors")
    for place in (tmp_path / "kohya", tmp_path / "kohya" / "step-2"):
        with pytest.raises(
            ValueError,
            match=r"step-2 holds 2 LoRA files without a configuration, name them one by one .*: other\.saf.*, style",
        ):
            AdapterSet.load(place)
    (tmp_path / "kohya" / "step-1" / "style.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"step-1/style\.safetensors is truncated or not a safetensors file"):
        AdapterSet.load(tmp_path / "kohya")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="empty holds no adapter: looked for"):
        AdapterSet.load(tmp_path / "empty")
