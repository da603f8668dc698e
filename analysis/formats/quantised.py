"""Quantised weights as the numbers they stand for, in formats with public arithmetic; others are refused.

Supported: int8 with row scales (``SCB`` of bitsandbytes: ``W = q · SCB / 127``), int8 and float8 with ``weight_scale``
or ``weight_scale_inv`` (``W = q · scale``: one number, one per row, or one per block), and bitsandbytes' nf4 and fp4.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.formats.files import FLOAT8, NUMBERS, finite_floats, is_whole

SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")
STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_BESIDE = {"bias", "input_scale", "output_scale", "q_scale", "k_scale", "v_scale", "scale_input"}
"""Tensors beside a weight that do not change it: biases and the scales of activations."""
_BLOCK = 128
"""Rows and columns per scale of float8 checkpoints, as DeepSeek writes them, if the configuration has no number."""
PACKED = ("qweight", "weight_packed", "W_q", "weight._data", "weight:_data", "weight_blocks", "blocks")
"""Last components of packed weights, in place of ``weight``: GPTQ, AWQ, HQQ, quanto, MXFP4."""

Load = Callable[[str], Tensor]
"""Reads the tensor beside a weight with this last component."""


def is_packed(name: str) -> bool:
    """Whether a tensor's name is that of a weight packed into integers."""
    return name.endswith((*(f".{end}" for end in PACKED), "_blocks"))


def part_of_weight(name: str) -> tuple[str, str] | None:
    """Layer and last component of a tensor that stands beside ``weight``; None for names without a dot.

    >>> part_of_weight("h.0.q.weight.quant_state.bitsandbytes__nf4"), part_of_weight("h.0.q.SCB")
    (('h.0.q', 'weight.quant_state.bitsandbytes__nf4'), ('h.0.q', 'SCB'))
    """
    layer, dot, rest = name.partition(".weight.")
    if dot:
        return layer, f"weight.{rest}"
    layer, dot, rest = name.rpartition(".")
    return (layer, rest) if dot else None


def is_scale(part: str) -> bool:
    """Whether a last component is that of a scale or of a quantisation state."""
    return part in {*SCALES, "SCB", "weight_format", *_BESIDE - {"bias"}} or part.startswith("weight.")


def refused(path: Path, name: str, what: str) -> ValueError:
    """The error for a quantised weight that is not read."""
    return ValueError(
        f"{path}: {name} is quantised: {what}, which is not read. Save the model dequantised, in bfloat16 or float32"
    )


def weight_numbers(
    path: Path, name: str, weight: Tensor, parts: Collection[str], load: Load, config: Mapping[str, Any]
) -> Tensor:
    """The numbers that a stored weight stands for, float32; ValueError for a format that is not read.

    `parts` are the last components of the tensors beside it, and `load` reads one of them. `config` is the model's
    ``quantization_config``, or empty; ``weight_block_size`` is read.
    """
    beside = sorted(set(parts) - _BESIDE)
    states = [state for state in STATES if state in beside]
    scales = [scale for scale in SCALES if scale in beside]
    odd = [part for part in beside if part not in (*SCALES, "SCB", "weight_format")]
    if states and set(odd) <= {states[0], *_FOUR_BIT} and weight.dtype in (torch.uint8, *NUMBERS):
        codes = weight.contiguous().flatten().view(torch.uint8)  # bytes, of whatever type bitsandbytes stored them as
        return _four_bit(path, name, codes, load, states[0], beside)
    if weight.dtype in NUMBERS and not scales and "SCB" not in beside and not any(map(is_scale, odd)):
        return finite_floats(weight, path, name)
    if weight.dtype == torch.int8 and beside in (["SCB"], ["SCB", "weight_format"]):
        if "weight_format" in beside and load("weight_format").any():
            raise refused(path, name, "int8 in tiles of a GPU")
        rows = finite_floats(load("SCB"), path, f"{name} (SCB)")
        return finite_floats(weight.float() * _spread(path, name, rows, weight.shape, {}) / 127, path, name)
    if weight.dtype in (torch.int8, *FLOAT8) and len(scales) == 1 and beside == scales:
        scale = finite_floats(load(scales[0]), path, f"{name} ({scales[0]})")
        return finite_floats(weight.float() * _spread(path, name, scale, weight.shape, config), path, name)
    if weight.dtype in FLOAT8 and not beside and not config:
        return finite_floats(weight, path, name)  # rounded to float8 without a scale
    kind = str(weight.dtype).removeprefix("torch.")
    raise refused(path, name, f"{kind} with {', '.join(beside)}" if beside else f"{kind} without a scale")


def _spread(path: Path, name: str, scale: Tensor, shape: torch.Size, config: Mapping[str, Any]) -> Tensor:
    """One scale per entry of a weight, or a tensor that broadcasts to it."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        scale = scale[:, None]
    error = refused(path, name, f"scales of shape {tuple(scale.shape)} for a weight of shape {tuple(shape)}")
    if len(shape) != 2 or scale.ndim != 2:
        raise error
    block = config.get("weight_block_size") or (_BLOCK, _BLOCK)
    for axis in (0, 1):
        size, count = shape[axis], scale.shape[axis]
        if count in (1, size):
            continue
        each = block[axis] if isinstance(block, Sequence) and len(block) == 2 else None
        if not is_whole(each) or each < 1 or count != math.ceil(size / each):
            raise error
        scale = scale.repeat_interleave(each, axis).narrow(axis, 0, size)
    return scale


_FOUR_BIT = {"weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"}


def four_bit_state(path: Path, name: str, state: Tensor) -> dict[str, Any]:
    """Block sizes and shape of a 4-bit weight of bitsandbytes, from JSON stored as bytes; ValueError if damaged."""
    try:
        content = json.loads(bytes(state.to(torch.uint8).flatten().tolist()).decode())
        sizes = [*content["shape"], content["blocksize"], content.get("nested_blocksize", 1)]
        if not all(is_whole(size) and size > 0 for size in sizes) or len(content["shape"]) != 2:
            raise ValueError(f"sizes are {sizes}, positive integers were expected")
        content["nested_offset"] = float(content.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: the quantisation state of {name} is damaged: {error}") from error
    return dict(content)


def _four_bit(path: Path, name: str, weight: Tensor, load: Load, key: str, beside: Collection[str]) -> Tensor:
    """Bitsandbytes' 4-bit weight: two codes per byte, the high one first, times the largest entry of each block."""
    state = four_bit_state(path, name, load(key))
    nested = "weight.nested_absmax" in beside
    needed = _FOUR_BIT if nested else {"weight.absmax", "weight.quant_map"}
    if missing := needed - set(beside):
        raise refused(path, name, f"4 bits without {', '.join(sorted(missing))}")

    def numbers(part: str) -> Tensor:
        return finite_floats(load(part), path, f"{name} ({part})").flatten()

    m, n = state["shape"]
    codes, table, largest = weight.flatten(), numbers("weight.quant_map"), load("weight.absmax").flatten()
    block, second_block = state["blocksize"], state.get("nested_blocksize", 1)
    fits = table.numel() == 16 and codes.numel() == math.ceil(m * n / 2) and largest.numel() == math.ceil(m * n / block)
    if nested and fits:
        blocks, second = numbers("weight.nested_absmax"), numbers("weight.nested_quant_map")
        fits = largest.dtype == torch.uint8 and second.numel() == 256
        fits = fits and blocks.numel() == math.ceil(largest.numel() / second_block)
    if not fits:
        raise refused(path, name, f"4 bits whose sizes do not fit the shape {(m, n)}")
    if nested:
        each = torch.arange(largest.numel()) // second_block
        largest = second[largest.long()] * blocks[each] + state["nested_offset"]
    else:
        largest = numbers("weight.absmax")
    values = table[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()[: m * n]]
    return finite_floats((values * largest[torch.arange(m * n) // block]).reshape(m, n), path, name)
