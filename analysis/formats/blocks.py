"""Updates that are made of blocks: tiles of one block (MiSS), blocks of low rank (GraLoRA), circulant ones (C3A)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats.structured import Factors, Stored, StructuredLayer, Tensors, full, needed, sizes, unequal


def miss(
    path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int], start: object
) -> StructuredLayer:
    """MiSS' update, a block D (r, m) repeated along the inputs: left ``Dᵀ``, right repeated identities, of rank r.

    Variant ``mini`` repeats D along the outputs too. Variant ``bat`` is ``W D + D`` block by block, and needs W.
    """
    m, n = shape
    found = stored[parts["block"]]
    if start == "bat":
        blocks, r, columns = sizes(path, stored, parts["block"], 3)
        if r != columns or blocks * r != m or n % r:
            raise unequal(path, f"the shape of {parts['block']}", found, f"blocks of a matrix {shape}")
        return StructuredLayer(parts, (m, n, min(m, n)), _bat_factors, relative=True)
    r, width = sizes(path, stored, parts["block"], 2)
    if r > n or m % width or (start != "mini" and width != m):
        raise unequal(path, f"the shape of {parts['block']}", found, f"a block of a matrix {shape}")
    return StructuredLayer(parts, (m, n, r), partial(_miss_factors, m, n))


def _miss_factors(m: int, n: int, tensors: Tensors, weight: Tensor) -> Factors:
    block = tensors["block"]
    repeated = torch.eye(len(block), dtype=block.dtype).repeat(-(-n // len(block)), 1)[:n]
    return block.mT.repeat(m // block.shape[1], 1), repeated


def _bat_factors(tensors: Tensors, weight: Tensor) -> Factors:
    block = tensors["block"]
    r = block.shape[-1]
    m, n = weight.shape
    tiles = weight.reshape(m // r, r, n // r, r).permute(2, 0, 1, 3)
    return full((tiles @ block + block).permute(1, 2, 0, 3).reshape(weight.shape))


def gralora(path: Path, stored: Stored, parts: Mapping[str, str], scaling: float) -> StructuredLayer:
    """GraLoRA's update: k × k blocks of rank r / k, and a LoRA beside them if ``hybrid_r`` is set; rank k r."""
    needed(path, parts, "a", "b")
    (k, width, r), (count, rank, height) = (sizes(path, stored, parts[part], 3) for part in "ab")
    m, n = count * height, k * width
    if k != count or r != rank or r % k:
        found = {name: stored[name] for name in parts.values()}
        raise unequal(path, "the shape of GraLoRA's tensors", found, "(k, n / k, r) and (k, r, m / k)")
    hybrid = 0
    if parts.keys() & {"left", "right"}:
        needed(path, parts, "left", "right")
        hybrid = sizes(path, stored, parts["left"], 2)[1]
        if stored[parts["left"]] != (m, hybrid) or stored[parts["right"]] != (hybrid, n):
            raise unequal(
                path, f"the shape of {parts['left']}", stored[parts["left"]], f"a factor of a matrix {(m, n)}"
            )
    return StructuredLayer(parts, (m, n, k * r + hybrid), partial(_gralora_factors, scaling))


def _gralora_factors(scaling: float, tensors: Tensors, weight: Tensor) -> Factors:
    a, b = tensors["a"], tensors["b"]
    k, width, r = a.shape
    left, right = b.new_zeros(k, b.shape[2], k, r), a.new_zeros(k, width, k, k, r // k)
    for block in range(k):  # columns are (block of outputs, block of inputs, s)
        left[block, :, block] = b[block].mT
        right[block, :, :, block] = a[block].reshape(width, k, r // k)
    left, right = left.flatten(2).flatten(0, 1), right.flatten(2).flatten(0, 1)
    if "left" in tensors:
        left, right = torch.cat([left, tensors["left"]], dim=1), torch.cat([right, tensors["right"].mT], dim=1)
    return left * scaling, right


def circulant(path: Path, stored: Stored, parts: Mapping[str, str]) -> StructuredLayer:
    """C3A's update: circulant blocks, entry (p, q) of each its kernel's entry q − p, over the number of inputs."""
    rows, columns, size = sizes(path, stored, parts["kernel"], 3)
    m, n = rows * size, columns * size
    return StructuredLayer(parts, (m, n, min(m, n)), _circulant_factors)


def _circulant_factors(tensors: Tensors, weight: Tensor) -> Factors:
    kernel = tensors["kernel"]
    rows, columns, size = kernel.shape
    shifts = (torch.arange(size) - torch.arange(size)[:, None]) % size
    blocks = kernel[:, :, shifts].permute(0, 2, 1, 3)
    return full(blocks.reshape(rows * size, columns * size) / (columns * size))
