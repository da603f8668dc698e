"""Are these gradients fit to step on? Asked once a step, before anything changes, and answered alike on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_cl.optim.layout import layout_of
from manifold_cl.optim.sharing import tally

LARGE = 1e6
"""Norm from which a gradient, times its rate, may lead to a displacement that overflows: such a step is prepared to be
undone. Training that works stays far below."""


def inspect_gradients(
    points: Sequence[Tensor], rates: Sequence[float], groups: Iterable[Any]
) -> tuple[list[Tensor], bool]:
    """The points whose gradient holds NaN or infinite entries, and whether any other is `LARGE`; alike on all ranks.

    Reads one number per point.

    Args:
        points: all points, with a gradient or without.
        rates: the learning rate of each; it counts where it is above 1.
        groups: process groups whose ranks must agree.

    Raises:
        ValueError: on every rank, when a point has a gradient on some ranks only.
    """
    groups = list(groups)
    present = [p.grad is not None for p in points]
    norms = iter(_norms([p for p in points if p.grad is not None]))
    norm = [next(norms) if here else 0.0 for here in present]
    bad = [math.isnan(size) for size in norm]
    large = [size * max(1.0, rate) > LARGE for size, rate in zip(norm, rates, strict=True)]
    if groups:
        device = points[0].device if points else torch.device("cpu")
        mixed, flags = tally(torch.tensor(present, device=device), torch.tensor([bad, large], device=device), groups)
        if bool(mixed.any()):
            first = points[int(mixed.nonzero()[0])]
            raise ValueError(
                f"{int(mixed.sum())} points have a gradient on some ranks only, the first of shape "
                f"{tuple(first.shape)}: the ranks would part; let DDP average gradients (find_unused_parameters=True) "
                "or call average_gradients"
            )
        bad, large = flags.tolist()
    return [p for p, is_bad in zip(points, bad, strict=True) if is_bad], any(large)


def refusal(bad: Sequence[Tensor], among: int) -> str:
    """The message for gradients that are not finite."""
    return (
        f"{len(bad)} of {among} points have NaN or infinite entries in their gradient, the first of shape "
        f"{tuple(bad[0].shape)}: nothing was changed; look at the loss, use a GradScaler, or pass nonfinite='skip'"
    )


def _norms(active: Sequence[Tensor]) -> list[float]:
    """The norm of each gradient, NaN where an entry is not finite; one read per device and dtype."""
    grads = [layout_of(p).local(p.grad) for p in active if p.grad is not None]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    norms = [0.0] * len(grads)
    for places in kinds.values():
        read = torch.stack(torch._foreach_norm([grads[i] for i in places])).tolist()
        for i, norm in zip(places, read, strict=True):
            overflown = not math.isfinite(norm) and bool(grads[i].isfinite().all())
            norms[i] = math.inf if overflown else norm if math.isfinite(norm) else math.nan
    return norms
