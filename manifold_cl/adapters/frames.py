"""Frames and their manifolds: measured before an update leaves the model, and loaded together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.linalg import full_precision

OFF = 1e-3
"""Constraint error from which a frame is refused: training in float32 stays below 2e-6, an average of weights above."""

Points = Iterable[tuple[str, Tensor, RestrictedStiefel]]


def validate_frames(points: Points, *, to: str) -> None:
    """Refuse frames that are off their manifolds by more than `OFF`, NaN included. O(n r (k + r)) per frame.

    Args:
        points: (name, frame, manifold).
        to: what the frames are wanted for, for the message.

    Raises:
        ValueError: naming the frame that is farthest off, with its errors and the remedy.
    """
    off = {}
    for name, frame, manifold in points:
        if type(frame.data) is not Tensor or frame.device.type == "meta":
            continue  # sharded over ranks: it is measured where it was gathered
        error = manifold.constraint_error(frame)
        if not all(value <= OFF for value in error):
            off[name] = error
    if off:
        if damaged := [name for name, error in off.items() if math.isnan(sum(error))]:
            raise ValueError(f"cannot {to} {damaged[0]}, which holds NaN or infinite values: train the adapter again")
        worst = max(off, key=lambda name: sum(off[name]))
        raise ValueError(
            f"cannot {to} adapters that are off their manifolds: {len(off)} frames, farthest {worst} ({off[worst]}; "
            f"up to {OFF:g} is accepted). Weights were averaged (EMA, SWA, Lookahead) or stepped by an optimizer that "
            "is not Riemannian: call retract_adapters(model), which replaces each frame by its manifold's projx(frame)"
        )


def points_of(module: nn.Module) -> Points:
    """The frames of a module with their manifolds; none for modules without."""
    own: Any = getattr(module, "manifold_parameters", None)
    yield from own() if own is not None else ()


@torch.no_grad()
def adopt_protection(
    manifold: RestrictedStiefel, frame: Tensor, *, saved: Tensor | None, saved_frame: Tensor | None, name: str
) -> str | None:
    """Make room for the protected subspace of a state that is about to be loaded; returns what is wrong, or None.

    A manifold without protection takes the saved one over, so that a resumed training goes on under it.

    Args:
        manifold: of the frame.
        frame: as it is now.
        saved: the state's complement (n, k), if it has one.
        saved_frame: the state's frame, if it has one.
        name: of the frame, for the message.
    """
    held = manifold.complement
    known = held is not None and type(held) is Tensor and held.device.type != "meta" and manifold.k > 0
    if saved is None:
        if known and saved_frame is not None and saved_frame.shape == frame.shape:
            if type(saved_frame.data) is not Tensor:
                return None  # sharded over ranks
            error = manifold.constraint_error(saved_frame.to(held.device))  # type: ignore[union-attr]
            if not error.protection <= OFF:
                return (
                    f"{name}: the saved frame reaches into what this model protects ({error.protection:.1e}) and has "
                    "no protected subspace: load the state first, then protect"
                )
        return None
    if known and saved.device.type != "meta" and (fewer := int((saved != 0).any(dim=-2).sum())) < manifold.k:
        warnings.warn(
            f"{name}: {manifold.k} protected directions are replaced by the {fewer} of the loaded state: protect again",
            UserWarning,
            stacklevel=2,
        )
    if held is None or held.shape != saved.shape:
        manifold.complement = torch.zeros(saved.shape, dtype=saved.dtype, device=frame.device)
    return None


def adopt_all(
    points: Iterable[tuple[str, Tensor, str, RestrictedStiefel]], state: Mapping[str, Any], prefix: str
) -> list[str]:
    """`adopt_protection` for (name of the frame, frame, name of its manifold, manifold); the differences found."""
    found = [
        adopt_protection(
            manifold,
            frame,
            saved=state.get(f"{prefix}{key}.complement"),
            saved_frame=state.get(prefix + name),
            name=prefix + name,
        )
        for name, frame, key, manifold in points
    ]
    return [message for message in found if message is not None]


FILL = 0.01
"""Share of the present frame in a start that lacks directions: far above rounding, a tilt of half a degree at most."""
EXACT = 512
"""Smaller side of a weight up to which its singular vectors come from a whole SVD."""
OVERSAMPLING = 4
"""Sketch size over rank: exact for any decaying spectrum together with four passes (method.md 6.11)."""
PASSES = 4


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
