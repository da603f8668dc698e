"""Orthonormal bases that six bits per entry define exactly: the stored form defines the basis.

Rounding a basis F after frames were made orthogonal to it would leak 1e-3 of each frame. Here the rounded columns
define the protected subspace before any frame is made orthogonal to it, so that a reader computes the same F again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_cl.linalg import project_out

BLOCK = 64
"""Rows of one column that share a scale."""
LARGEST = 31
"""Largest whole number that an entry is stored as."""
STEPS = 4
"""Scales are powers of 2^(1/4)."""
BYTES = BLOCK * 6 // 8 + 1
"""Bytes of a block: 64 numbers of six bits, and the exponent of their scale."""
PANEL = 32
"""Columns that are made orthonormal together."""


def pack(basis: Tensor) -> Tensor:
    """The entries of a basis (n, k), rounded to 31 steps of each sign: uint8 (k, ⌈n / 64⌉ · 49), one row per column.

    Rounding turns the span by about 0.03 radians, which costs about 1e-3 of the energy along it.
    """
    n, k = basis.shape
    blocks = -(-n // BLOCK)
    entries = torch.zeros(k, blocks * BLOCK, dtype=torch.float64, device=basis.device)
    entries[:, :n] = basis.mT
    entries = entries.view(k, blocks, BLOCK)
    peak = entries.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    exponent = (STEPS * (peak / (LARGEST + 0.5)).log2()).ceil().clamp(-128, 127)
    numbers = (entries / (exponent / STEPS).exp2()).round().clamp(-LARGEST, LARGEST)
    a, b, c, d = (numbers.to(torch.int32) + LARGEST + 1).view(k, blocks, BLOCK // 4, 4).unbind(-1)
    codes = torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], dim=-1) & 255
    return torch.cat([codes.flatten(-2), exponent.to(torch.int32) + 128], dim=-1).to(torch.uint8).flatten(1)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The orthonormal basis (n, k), float32, of packed columns, by `orthonormal_in_panels` in float64.

    Raises:
        ValueError: for a tensor that is not packed columns of n rows, or whose columns are dependent.
    """
    blocks = -(-n // BLOCK)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != blocks * BYTES or packed.shape[0] > n:
        raise ValueError(
            f"packed columns of {n} rows are uint8 of shape (k, {blocks * BYTES}), got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
    bytes_ = packed.to(torch.int32).view(len(packed), blocks, BYTES)
    x, y, z = bytes_[..., :-1].view(len(packed), blocks, BLOCK // 4, 3).unbind(-1)
    numbers = torch.stack([x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2], dim=-1) - (LARGEST + 1)
    scales = ((bytes_[..., -1:] - 128).double() / STEPS).exp2()
    columns = (numbers.flatten(-2).double() * scales).flatten(1)[:, :n].mT
    return orthonormal_in_panels(columns).to(torch.float32).contiguous()


def orthonormal_in_panels(columns: Tensor) -> Tensor:
    """The Q of ``columns`` (n, k) with a positive diagonal of R, whose first columns do not depend on later ones.

    Not even in their last bit: a library rounds the decompositions of matrices of different sizes differently. So this
    one has panels of one size, filled up with zeros, each projected off those before it (block Gram-Schmidt).
    Rounded orthonormal columns have a condition near 1, so that one projection is enough. O(n k²).

    Raises:
        ValueError: for columns that are dependent.
    """
    n, k = columns.shape
    done = columns[:, :0]
    for start in range(0, k, PANEL):
        given = columns[:, start : start + PANEL]
        panel = columns.new_zeros(n, PANEL)
        panel[:, : given.shape[1]] = given
        q, r = torch.linalg.qr(project_out(panel, done))
        diagonal = r.diagonal()[: given.shape[1]]
        if bool((diagonal.abs() < 1e-3).any()):  # rounded unit columns have lengths near 1
            raise ValueError("packed columns are dependent: the file was changed or damaged")
        done = torch.cat([done, q[:, : given.shape[1]] * diagonal.sign()], dim=1)
    return done
