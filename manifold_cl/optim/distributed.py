"""Several ranks: which rank computes which point, and what ranks agree on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manifold_cl.layouts import WHOLE, RowSharded, layout_of
from manifold_cl.lists import listed

LARGE = 1e6
"""Norm from which a gradient, times its rate, may lead to a displacement that overflows: such a step is prepared to be
undone. Training that works stays far below."""


def sharding_groups(parameters: Iterable[Tensor]) -> list[Any]:
    """The process groups over which rows of these parameters are spread, in the same order on every rank."""
    layouts = [layout for p in parameters if isinstance(layout := layout_of(p), RowSharded)]
    return list(dict.fromkeys(layout.group for layout in layouts))


class Owners:
    """Assigns the members of buckets to ranks: each rank computes its own and receives the others.

    The element-wise base step runs everywhere on the same numbers, so states are complete on every rank.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._sent: list[Tensor] = []

    def parts(self, members: int, turn: int) -> list[slice]:
        """The slice of a bucket per rank; ``turn`` rotates the first rank, so that small buckets spread."""
        chunk = -(-members // self.size)
        starts = [((rank + turn) % self.size) * chunk for rank in range(self.size)]
        return [slice(min(start, members), min(start + chunk, members)) for start in starts]

    def share_(self, slab: Tensor, parts: Sequence[slice]) -> None:
        """Replace the parts of ``slab`` (B, …) by those of their owners."""
        owned = [(rank, slab[part]) for rank, part in enumerate(parts) if part.stop > part.start]
        pending = [
            dist.broadcast(part, dist.get_global_rank(self.group, rank), group=self.group, async_op=True)
            for rank, part in owned
        ]
        for work in filter(None, pending):
            work.wait()
        # A thread of Gloo that drops a tensor last takes Python's lock, which aborts a process that is ending.
        self._sent = [part for _, part in owned]

    def add_(self, total: Tensor, device: torch.device) -> None:
        """Replace a number on the host by its sum over the group; the exchange runs on ``device``."""
        summed = total.to(device)
        dist.all_reduce(summed, group=self.group)
        total.copy_(summed)


def measure_gradients(
    points: Sequence[Tensor], rates: Sequence[float], ranks: Iterable[Any]
) -> tuple[list[Tensor], bool]:
    """The points with NaN or infinite entries in their gradient, and whether another one is `LARGE`.

    Reads one number per point. ``rates`` are learning rates per point, which count above 1. Ranks of the process
    groups ``ranks`` get the same answer, and all refuse a point with a gradient on some of them only.
    """
    ranks = list(ranks)
    present = [p.grad is not None for p in points]
    norms = iter(_norms([p for p in points if p.grad is not None]))
    norm = [0.0 if p.grad is None else next(norms) for p in points]
    bad = [math.isnan(size) for size in norm]
    large = [size * max(1.0, rate) > LARGE for size, rate in zip(norm, rates, strict=True)]
    if ranks:
        device = points[0].device if points else torch.device("cpu")
        flags = torch.tensor([bad, large], device=device)
        here = torch.tensor(present, device=device)
        mixed = torch.zeros_like(here)
        for group in ranks:
            counts = torch.cat([here[None], flags]).float()
            dist.all_reduce(counts, group=group)
            mixed |= (counts[0] > 0) & (counts[0] < dist.get_world_size(group))
            here, flags = counts[0] > 0, counts[1:] > 0
        if bool(mixed.any()):
            first = points[int(mixed.nonzero()[0])]
            raise ValueError(
                f"{int(mixed.sum())} points have a gradient on some ranks only, the first of shape "
                f"{tuple(first.shape)}: the ranks would part; let DDP average gradients (find_unused_parameters=True) "
                "or call average_gradients"
            )
        bad, large = flags.tolist()
    return [p for p, is_bad in zip(points, bad, strict=True) if is_bad], any(large)


def _norms(active: Sequence[Tensor]) -> list[float]:
    """The norm of each gradient, NaN where an entry is not finite; one read per device and dtype."""
    grads = [layout_of(p).local(p.grad) for p in active if p.grad is not None]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    norms = [0.0] * len(grads)
    for indices in kinds.values():
        read = torch.stack(torch._foreach_norm([grads[i] for i in indices])).tolist()
        for i, norm in zip(indices, read, strict=True):
            overflown = not math.isfinite(norm) and bool(grads[i].isfinite().all())
            norms[i] = math.inf if overflown else norm if math.isfinite(norm) else math.nan
    return norms


def assert_ranks_equal(model: nn.Module | Iterable[Tensor], *, group: Any = None) -> None:
    """Check that every rank holds the same parameters, bit for bit. A collective: call it on all ranks.

    Sharded parameters are skipped, because no two ranks hold the same part.

    Args:
        model: a module, whose trainable parameters are compared, or tensors.
        group: the ranks to compare; all of them if not given.

    Raises:
        RuntimeError: on every rank, naming the parameters that differ; also where torch.distributed is not set up.
    """
    if not dist.is_initialized():
        raise RuntimeError("assert_ranks_equal compares ranks: call torch.distributed.init_process_group first")
    named = (
        [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if isinstance(model, nn.Module)
        else [(f"tensor {i}", p) for i, p in enumerate(model)]
    )
    source = 0 if group is None else dist.get_global_rank(group, 0)
    differing = []
    for name, p in named:
        if layout_of(p) is not WHOLE:
            continue
        own = p.detach().contiguous().view(-1).view(torch.uint8)
        reference = own.clone()
        dist.broadcast(reference, source, group=group)
        same = torch.tensor(int(torch.equal(own, reference)), device=p.device)
        dist.all_reduce(same, op=dist.ReduceOp.MIN, group=group)
        if not int(same):
            differing.append(name)
    if differing:
        raise RuntimeError(
            f"ranks hold different values of {listed(differing, 5)}: "
            "start from one checkpoint, and give the optimizer process_group= so that every point has one owner"
        )


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], *, group: Any = None) -> None:
    """Replace gradients by their mean over ranks, for ``ignored_params`` (docs/optimizers.md, "On several devices").

    Call it between ``backward`` and ``step``. A rank without a gradient contributes zero.
    """
    size = dist.get_world_size(group)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad, group=group)
        p.grad.div_(size)
