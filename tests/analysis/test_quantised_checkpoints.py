"""Quantised weights are read as the numbers they stand for, or refused by name; integers are never weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis import AdapterSet, Checkpoint

LAYER = "model.layers.0.q_proj"
W = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


def checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{LAYER}.{key}": value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    return folder


def read(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Tensor:
    return Checkpoint.load(checkpoint(folder, tensors, config)).tensor(f"{LAYER}.weight")


def test_int8_rows_are_scaled_by_the_largest_entry_over_127(tmp_path: Path) -> None:
    largest = W.abs().amax(1)
    codes = (W / largest[:, None] * 127).round().to(torch.int8)
    found = read(tmp_path, {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)})
    # half a code of a row's scale, with the rounding of one product in float32
    assert ((found - W).abs() <= largest[:, None] / 254 * (1 + 1e-6)).all()
    with pytest.raises(ValueError, match=r"q_proj\.weight is quantised: int8 in tiles"):
        read(tmp_path, {"weight": codes, "SCB": largest, "weight_format": torch.tensor(2, dtype=torch.uint8)})


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
def test_float8_is_multiplied_by_its_scale(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    codes = W.to(torch.float8_e4m3fn)
    rows = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    found = read(tmp_path, {"weight": codes, name: scale, "input_scale": torch.tensor(3.0), "bias": torch.ones(6)})
    torch.testing.assert_close(found, codes.float() * rows, rtol=0, atol=0)


@pytest.mark.parametrize("config", [None, {"weight_block_size": [128, 128]}, {"weight_block_size": [96, 64]}])
def test_blocks_of_scales_end_with_the_weight(tmp_path: Path, config: dict[str, Any] | None) -> None:
    rows, columns = config["weight_block_size"] if config else (128, 128)
    draw = torch.Generator().manual_seed(2)
    codes = torch.randn(200, 130, generator=draw).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-200 // rows), -(-130 // columns), generator=draw) + 0.5
    found = read(tmp_path, {"weight": codes, "weight_scale_inv": scale}, config)
    for i, j in ((0, 0), (rows, 0), (199, 129), (rows - 1, columns - 1)):
        assert found[i, j] == codes[i, j].float() * scale[i // rows, j // columns]
    with pytest.raises(ValueError, match=r"scales of shape \(5, 2\) for a weight of shape \(200, 130\)"):
        read(tmp_path, {"weight": codes, "weight_scale_inv": torch.ones(5, 2)}, config)


def four_bit(codes: Tensor, shape: tuple[int, int], largest: Tensor, **state: Any) -> dict[str, Tensor]:
    """A 4-bit weight as bitsandbytes stores it: the first of two codes in the high half of a byte."""
    codes = torch.cat([codes, codes.new_zeros(codes.numel() % 2)])
    noted = json.dumps({"quant_type": "nf4", "blocksize": 16, "shape": list(shape), **state}).encode()
    return {
        "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": largest,
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(noted), dtype=torch.uint8),
    }


@pytest.mark.parametrize("shape", [(6, 10), (5, 7)])
def test_four_bits_are_codes_of_a_table_times_the_blocks_largest_entry(tmp_path: Path, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(3)
    count = shape[0] * shape[1]
    codes = torch.randint(0, 16, (count,), generator=draw)
    largest = torch.rand(-(-count // 16), generator=draw) + 0.5
    exact = (torch.linspace(-1, 1, 16)[codes] * largest.repeat_interleave(16)[:count]).reshape(shape)
    torch.testing.assert_close(read(tmp_path, four_bit(codes, shape, largest)), exact, rtol=0, atol=0)
    assert Checkpoint.load(tmp_path).shape(f"{LAYER}.weight") == shape

    table = torch.linspace(-1, 1, 256)
    nested = {"weight.nested_absmax": torch.tensor([0.25, 0.5]), "weight.nested_quant_map": table}
    inner = torch.randint(0, 256, (largest.numel(),), generator=draw).to(torch.uint8)
    stored = four_bit(codes, shape, inner, nested_blocksize=2, nested_offset=1.5) | nested
    outer = torch.tensor([0.25, 0.25, 0.5, 0.5])[: largest.numel()]
    if largest.numel() <= 4:
        second = table[inner.long()] * outer + 1.5
        exact = (torch.linspace(-1, 1, 16)[codes] * second.repeat_interleave(16)[:count]).reshape(shape)
        needed = -(-largest.numel() // 2)
        stored["weight.nested_absmax"] = nested["weight.nested_absmax"][:needed]
        torch.testing.assert_close(read(tmp_path, stored), exact, rtol=0, atol=0)
    with pytest.raises(ValueError, match="sizes do not fit the shape"):
        read(tmp_path, four_bit(codes, (shape[0] + 1, shape[1]), largest))
    with pytest.raises(ValueError, match=r"quantisation state of .* is damaged"):
        read(tmp_path, four_bit(codes, shape, largest, blocksize=0))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": W.to(torch.int8)}, "int8 without a scale"),
        ({"weight": W.to(torch.int64)}, "int64 without a scale"),
        ({"weight": W > 0}, "bool without a scale"),
        ({"weight": W.to(torch.uint8), "weight.absmax": torch.ones(2)}, "uint8 with weight.absmax"),
        ({"weight": W.to(torch.int8), "SCB": torch.ones(6), "zeros": torch.ones(6)}, "int8 with SCB, zeros"),
        ({"weight": W.to(torch.int8), "weight_scale": torch.ones(6), "weight_zero_point": torch.ones(6)}, "int8 with"),
        ({"weight": W.to(torch.int8), "SCB": torch.ones(10)}, r"scales of shape \(10, 1\)"),
        ({"weight": W.to(torch.float8_e4m3fn), "pre_quant_scale": torch.ones(10)}, "float8_e4m3fn with pre_quant"),
        ({"weight": W, "weight_scale": torch.ones(6)}, "float32 with weight_scale"),
        ({"weight": W.to(torch.int8), "SCB": torch.full((6,), torch.nan)}, "contains NaN"),
    ],
)
def test_what_is_not_known_exactly_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, tensors)


def test_float8_without_a_scale_is_read_where_nothing_says_quantised(tmp_path: Path) -> None:
    codes = W.to(torch.float8_e5m2)
    torch.testing.assert_close(read(tmp_path / "a", {"weight": codes}), codes.float(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="float8_e5m2 without a scale"):
        read(tmp_path / "b", {"weight": codes}, {"quant_method": "fp8"})


@pytest.mark.parametrize("packed", ["qweight", "weight_packed", "W_q", "weight._data"])
def test_packed_weights_are_refused_as_base_and_as_difference(tmp_path: Path, packed: str) -> None:
    for folder in ("before", "after"):
        words = torch.randint(0, 99, (4, 3), dtype=torch.int32)
        checkpoint(tmp_path / folder, {packed: words, "scales": torch.rand(2, 3)})
    with pytest.raises(ValueError, match=rf"q_proj\.{packed} is quantised: packed into integers"):
        Checkpoint.load(tmp_path / "before").name_of(LAYER)
    with pytest.raises(ValueError, match=rf"q_proj\.{packed} is quantised"):
        AdapterSet.load(tmp_path / "after", base=tmp_path / "before")


def test_experts_packed_in_blocks_are_refused_by_name(tmp_path: Path) -> None:
    for folder in ("before", "after"):
        stored = {"up_blocks": torch.randint(0, 99, (2, 4), dtype=torch.uint8), "up_scales": torch.rand(2)}
        checkpoint(tmp_path / folder, {**stored, "q.weight": torch.rand(3, 3)})
    with pytest.raises(ValueError, match=r"up_blocks is quantised: packed into integers"):
        Checkpoint.load(tmp_path / "after").name_of(f"{LAYER}.up")
    with pytest.raises(ValueError, match=r"up_blocks is quantised: packed into integers"):
        AdapterSet.load(tmp_path / "after", base=tmp_path / "before")


def test_differences_of_quantised_checkpoints_are_those_of_the_weights(tmp_path: Path) -> None:
    after = W + 0.3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(4))

    def float8(weight: Tensor) -> dict[str, Tensor]:
        step = weight.abs().max() / 448
        return {"weight": (weight / step).to(torch.float8_e4m3fn), "weight_scale_inv": step.reshape(1, 1)}

    places = [checkpoint(tmp_path / name, float8(weight)) for name, weight in (("before", W), ("after", after))]
    adapters = AdapterSet.load(places[1], base=places[0])
    left, right = adapters.factors("after", LAYER)
    # float8 with three bits of mantissa is off by 1/16 of an entry, twice
    assert torch.linalg.matrix_norm(left @ right.T - (after - W)) < 0.2 * torch.linalg.matrix_norm(after - W)
    assert adapters.notices == (f"after: stored quantised, so the update holds their rounding errors: {LAYER}.weight",)
    with pytest.raises(ValueError, match="no matrix differs"):
        AdapterSet.load(places[1], base=checkpoint(tmp_path / "same", float8(after)))


def test_factors_stored_as_integers_are_refused(tmp_path: Path) -> None:
    stem = "base_model.model.x"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, 5, dtype=torch.int8), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(ValueError, match=r"x\.lora_A\.weight is stored as int8: codes of a quantised tensor"):
        AdapterSet.load(tmp_path).factors(tmp_path.name, "x")


@pytest.mark.parametrize(
    "name", ["int8", "nf4", "nf4_nested", "nf4_nested_bfloat16", "nf4_nested_float32", "fp4", "fp4_nested"]
)
def test_weights_are_read_as_bitsandbytes_itself_reads_them(tmp_path: Path, name: str) -> None:
    """The file was written by bitsandbytes 0.50.2 on a CPU; `expected` is what it made of each layer.

    Bytes of 4-bit codes may be stored as numbers of another type (``quant_storage``), which are no weights.
    """
    stored = load_file(Path(__file__).with_name("bitsandbytes.safetensors"))
    parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    expected = parts.pop("expected")
    torch.testing.assert_close(read(tmp_path, parts), expected, rtol=2e-7, atol=0)  # two products in float32


def test_codes_in_numbers_are_never_weights(tmp_path: Path) -> None:
    for part in ("weight.absmax", "weight.quant_map"):
        with pytest.raises(ValueError, match=rf"q_proj\.weight is quantised: bfloat16 with {part}"):
            read(tmp_path / part, {"weight": W.bfloat16(), part: torch.ones(2)})
