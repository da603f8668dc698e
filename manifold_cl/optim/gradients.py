"""Are these gradients fit to step on? Asked once a step, before anything changes, and answered alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_cl.optim.layout import layout_of
from manifold_cl.optim.sharing import tally


def unfit(points: Sequence[Tensor], groups: Iterable[Any]) -> list[Tensor]:
    """The points whose gradient holds NaN or infinite entries, on any rank. Reads one number a point.

    Args:
        points: all points, with a gradient or without.
        groups: process groups whose ranks must agree.

    Raises:
        ValueError: on every rank, when a point has a gradient on some ranks only.
    """
    groups = list(groups)
    active = [p for p in points if p.grad is not None]
    bad = _nonfinite(active)
    if not groups:
        return bad
    ids = {id(p) for p in bad}
    device = points[0].device if points else torch.device("cpu")
    mixed, bad_anywhere = tally(
        torch.tensor([p.grad is not None for p in points], device=device),
        torch.tensor([id(p) in ids for p in points], device=device),
        groups,
    )
    if bool(mixed.any()):
        first = points[int(mixed.nonzero()[0])]
        raise ValueError(
            f"{int(mixed.sum())} points have a gradient on some ranks only, the first of shape {tuple(first.shape)}: "
            "the ranks would part; let DDP average gradients (find_unused_parameters=True) or call average_gradients"
        )
    return [p for p, is_bad in zip(points, bad_anywhere.tolist(), strict=True) if is_bad]


def refusal(bad: Sequence[Tensor], among: int) -> str:
    """What to say when points are not stepped on."""
    return (
        f"{len(bad)} of {among} points have NaN or infinite entries in their gradient, the first of shape "
        f"{tuple(bad[0].shape)}: nothing was changed; look at the loss, use a GradScaler, or pass nonfinite='skip'"
    )


def _nonfinite(active: Sequence[Tensor]) -> list[Tensor]:
    # A sum is not finite if an entry is not; the rare sum that overflows is looked at again, entry by entry.
    grads = [layout_of(p).local(p.grad) for p in active if p.grad is not None]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    suspects = []
    for places in kinds.values():
        finite = torch.stack([grads[i].sum() for i in places]).isfinite()
        if not bool(finite.all()):
            suspects += [i for i, fine in zip(places, finite.tolist(), strict=True) if not fine]
    return [active[i] for i in sorted(suspects) if not bool(grads[i].isfinite().all())]
