"""Orthonormal frames: how they start, and their validation against their manifolds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.linalg import full_precision

OFF = 1e-3
"""Constraint residual above which a frame is refused: training in float32 stays below 2e-6, averages do not."""
FILL = 0.01
"""Share of the present frame in a start that lacks directions: far above rounding, a tilt of half a degree at most."""
EXACT = 512
"""Smaller side of a weight up to which its singular vectors come from a complete SVD."""
OVERSAMPLING = 4
"""Sketch size over rank: exact for any decaying spectrum together with four passes."""
PASSES = 4

Points = Iterable[tuple[str, Tensor, RestrictedStiefel]]
"""(name, frame, manifold) of several frames."""


def validate_frames(points: Points, *, to: str) -> None:
    """Refuse frames that are off their manifolds by more than `OFF`, NaN included. O(n r (k + r)) per frame.

    Frames that are sharded over ranks are skipped: they are measured where they are gathered. ``to`` says what the
    frames are wanted for. The ValueError names the frame that is farthest off.
    """
    off = {}
    for name, frame, manifold in points:
        if type(frame.data) is not Tensor or frame.device.type == "meta":
            continue
        residuals = manifold.constraint_error(frame)
        if not all(value <= OFF for value in residuals):
            off[name] = residuals
    if not off:
        return
    if damaged := [name for name, residuals in off.items() if math.isnan(sum(residuals))]:
        raise ValueError(f"cannot {to} {damaged[0]}, which holds NaN or infinite values: train the adapter again")
    worst = max(off, key=lambda name: sum(off[name]))
    raise ValueError(
        f"cannot {to} adapters that are off their manifolds: {len(off)} frames, farthest {worst} ({off[worst]}; "
        f"up to {OFF:g} is accepted). Weights were averaged (EMA, SWA, Lookahead) or stepped by an optimizer that "
        "is not Riemannian: call retract_adapters(model), which replaces each frame by its manifold's projx(frame)"
    )


def random_frames(
    manifolds: Sequence[RestrictedStiefel], rows: Sequence[int], rank: int, *,
    generator: torch.Generator | None, device: torch.device | None = None,
) -> list[Tensor]:  # fmt: skip
    """Haar-random frames (n, r) in float32, one per manifold, drawn in this order; ValueError without room."""
    return [
        manifold.random(n, rank, dtype=torch.float32, device=device, generator=generator).as_subclass(Tensor)
        for manifold, n in zip(manifolds, rows, strict=True)
    ]


def nearest_frame(manifold: RestrictedStiefel, target: Tensor, present: Tensor) -> Tensor:
    """The point nearest to ``target``; where that lacks directions, the present frame supplies the others."""
    if target.shape != present.shape:
        raise ValueError(
            f"a frame of shape {tuple(present.shape)} cannot start along {tuple(target.shape)}: give as many columns, "
            "zero ones where there are no more directions"
        )
    try:
        return manifold.projx(target)
    except ValueError:  # no nearest point
        size = target.norm()
        return manifold.projx((target / size if size > 0 else target) + FILL * present)


@torch.no_grad()
def leading_vectors(
    weight: Tensor, rank: int, *, left_manifold: RestrictedStiefel, right_manifold: RestrictedStiefel,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The leading r singular vectors, (m, r) and (n, r), of the weight (m, n) outside both protected subspaces.

    A complete SVD for small weights, else block power iteration on a sketch of four times the rank. O(m n r).
    """
    with full_precision(weight.device):
        free = _project_out(right_manifold, _project_out(left_manifold, weight.float()).mT).mT
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


def _project_out(manifold: RestrictedStiefel, a: Tensor) -> Tensor:
    basis = manifold.complement
    return a if basis is None or not manifold.width else a - basis.to(a.dtype) @ (basis.to(a.dtype).mT @ a)
