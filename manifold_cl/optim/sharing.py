"""Several ranks, one step: who computes what, and whether all end with the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manifold_cl.optim.layout import WHOLE, RowSharded, layout_of


class Owners:
    """Members of buckets dealt out to the ranks of a group; each computes its own, all receive the results.

    The element-wise base step runs everywhere on the same numbers, so states are complete on every rank.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def parts(self, members: int, turn: int) -> list[slice]:
        """The slice of a bucket that each rank owns; ``turn`` rotates who begins, so that small buckets spread."""
        chunk = -(-members // self.size)
        starts = [((rank + turn) % self.size) * chunk for rank in range(self.size)]
        return [slice(min(start, members), min(start + chunk, members)) for start in starts]

    def share_(self, slab: Tensor, parts: Sequence[slice]) -> None:
        """Fill ``slab`` (B, …) with what each owner has in its part."""
        pending = [
            dist.broadcast(slab[part], dist.get_global_rank(self.group, rank), group=self.group, async_op=True)
            for rank, part in enumerate(parts)
            if part.stop > part.start
        ]
        for work in pending:
            if work is not None:
                work.wait()

    def add_(self, total: Tensor, device: torch.device) -> None:
        """Replace a number on the host by its sum over the group, which exchanges on ``device``."""
        there = total.to(device)
        dist.all_reduce(there, group=self.group)
        total.copy_(there)


def tally(present: Tensor, flags: Tensor, groups: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Which gradients are present on some ranks only, and the flags (k, B) that any rank has set; one all-reduce."""
    mixed = torch.zeros_like(present)
    for group in groups:
        counts = torch.cat([present[None], flags]).float()
        dist.all_reduce(counts, group=group)
        mixed |= (counts[0] > 0) & (counts[0] < dist.get_world_size(group))
        present, flags = counts[0] > 0, counts[1:] > 0
    return mixed, flags


def assert_ranks_equal(model: nn.Module | Iterable[Tensor], *, group: Any = None) -> None:
    """Check that every rank holds the same parameters, bit for bit; a collective, call it on all ranks.

    Sharded parameters are skipped: no two ranks hold the same part.

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
    first = 0 if group is None else dist.get_global_rank(group, 0)
    differing = []
    for name, p in named:
        if layout_of(p) is not WHOLE:
            continue
        mine = p.detach().contiguous().view(-1).view(torch.uint8)
        theirs = mine.clone()
        dist.broadcast(theirs, first, group=group)
        same = torch.tensor(int(torch.equal(mine, theirs)), device=p.device)
        dist.all_reduce(same, op=dist.ReduceOp.MIN, group=group)
        if not int(same):
            differing.append(name)
    if differing:
        raise RuntimeError(
            f"ranks hold different values of {', '.join(differing[:5])}"
            f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}: "
            "start from one checkpoint, and give the optimizer process_group= so that every point has one owner"
        )


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], *, group: Any = None) -> None:
    """Replace gradients by their mean over ranks, for parameters that an engine was told to ignore.

    ``fully_shard`` takes no 0-d parameters, such as the magnitudes of our adapters: pass them as ``ignored_params`` and
    call this between ``backward`` and ``step``. A rank without a gradient contributes zero.
    """
    size = dist.get_world_size(group)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad, group=group)
        p.grad.div_(size)


def groups_of(parameters: Iterable[Tensor]) -> list[Any]:
    """The process groups over which rows of these parameters are spread, in the order of the parameters.

    Every rank must use them in the same order, which a set does not have.
    """
    layouts = [layout for p in parameters if isinstance(layout := layout_of(p), RowSharded)]
    return list(dict.fromkeys(layout.group for layout in layouts))
