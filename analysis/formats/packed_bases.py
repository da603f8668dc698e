"""Protected bases in six bits per entry, as `memory.safetensors` of a compact memory holds them."""

import torch
from torch import Tensor

PACKED = ".packed"
"""Ending of their names."""
BLOCK, BYTES, MIDDLE, STEPS = 64, 49, 32, 4
"""Rows per scale, bytes per block, the code of zero, and scales per octave (docs/record-format.md)."""
PANEL = 32
"""Columns that are made orthonormal together."""


def unpacked(packed: Tensor, n: int) -> Tensor:
    """The orthonormal basis (n, k) that the packed columns (k, ⌈n / 64⌉ · 49) define, in float32."""
    blocks = -(-n // BLOCK)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != blocks * BYTES or len(packed) > n:
        raise ValueError(f"{packed.dtype} of shape {tuple(packed.shape)} are no packed columns of {n} rows")
    content = packed.to(torch.int32).view(len(packed), blocks, BYTES)
    x, y, z = content[..., :-1].view(len(packed), blocks, BLOCK // 4, 3).unbind(-1)
    codes = torch.stack([x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2], dim=-1).flatten(-2)
    scales = ((content[..., -1:] - 128).double() / STEPS).exp2()
    columns = ((codes - MIDDLE).double() * scales).flatten(1)[:, :n].mT
    done = columns[:, :0]
    for start in range(0, len(packed), PANEL):  # the first columns get the same bits, however many follow
        given = columns[:, start : start + PANEL]
        panel = columns.new_zeros(n, PANEL)
        panel[:, : given.shape[1]] = given
        q, r = torch.linalg.qr(panel - done @ (done.mT @ panel))
        signs = r.diagonal()[: given.shape[1]].sign()
        done = torch.cat([done, q[:, : given.shape[1]] * signs], dim=1)
    return done.float().contiguous()
