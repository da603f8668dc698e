"""Where a pair of frames starts: at random, along a task's directions, or along the pre-trained weight's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.linalg import full_precision

Start = Literal["random", "pretrained"]
STARTS: tuple[str, ...] = get_args(Start)

FILL = 0.01
"""Share of the present frame in a start that lacks directions: far above rounding, a tilt of half a degree at most."""
EXACT = 512
"""Smaller side of a weight up to which its singular vectors come from a whole SVD."""
OVERSAMPLING = 4
"""Sketch size over rank: exact for any decaying spectrum together with four passes (method.md 6.11)."""
PASSES = 4


def check_start(start: str) -> None:
    """Raise for a name that is no start."""
    if start not in STARTS:
        raise ValueError(
            f"start is one of {', '.join(STARTS)}, got {start!r}; for a task's directions use point_along(left, right)"
        )


def nearest_frame(manifold: RestrictedStiefel, wanted: Tensor, present: Tensor) -> Tensor:
    """The point nearest to ``wanted``; where that lacks directions, the present frame supplies the others.

    Raises:
        ValueError: for another shape than the frame's, which copying would repeat.
    """
    if wanted.shape != present.shape:
        raise ValueError(
            f"a frame of shape {tuple(present.shape)} cannot start along {tuple(wanted.shape)}: give as many columns, "
            "zero ones where there are no more directions"
        )
    try:
        return manifold.projx(wanted)
    except ValueError:  # no nearest point
        size = wanted.norm()
        return manifold.projx((wanted / size if size > 0 else wanted) + FILL * present)


@torch.no_grad()
def leading_vectors(
    weight: Tensor,
    rank: int,
    *,
    left_manifold: RestrictedStiefel,
    right_manifold: RestrictedStiefel,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The leading r singular vectors of what of the weight (m, n) both manifolds leave free: (m, r) and (n, r).

    A whole SVD for small weights, else block power iteration on a sketch of four times the rank. O(m n r).
    """
    with full_precision(weight.device):
        free = _off(right_manifold, _off(left_manifold, weight.float()).mT).mT
        m, n = free.shape
        size = min(OVERSAMPLING * rank, m, n)
        if min(m, n) <= EXACT:
            u, _, vt = torch.linalg.svd(free, full_matrices=False)
            return u[:, :rank].contiguous(), vt[:rank].mT.contiguous()
        source = generator.device if generator is not None else free.device
        basis = torch.randn(n, size, generator=generator, device=source).to(free.device)
        for _ in range(PASSES):
            basis = torch.linalg.qr(free.mT @ torch.linalg.qr(free @ basis).Q).Q
        u, _, vt = torch.linalg.svd(free @ basis, full_matrices=False)
        return u[:, :rank].contiguous(), (basis @ vt[:rank].mT).contiguous()


def _off(manifold: RestrictedStiefel, a: Tensor) -> Tensor:
    basis = manifold.complement
    return a if basis is None or not manifold.width else a - basis.to(a.dtype) @ (basis.to(a.dtype).mT @ a)
