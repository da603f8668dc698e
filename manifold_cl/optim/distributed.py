"""Several ranks: where the rows of a parameter are stored, which rank computes which point, what ranks agree on."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LARGE = 1e6
"""Norm from which a gradient, times its rate, may lead to a displacement that overflows: such a step is prepared to be
undone. Training that works stays far below."""


@dataclass(frozen=True)
class Whole:
    """The layout of an ordinary tensor: this process holds every row."""

    def local(self, p: Tensor) -> Tensor:
        """The tensor itself."""
        return p

    def rows(self, basis: Tensor) -> Tensor:
        """The rows of a complement that match the stored rows: all of them."""
        return basis

    def sum_(self, small: Tensor) -> Tensor:
        """The sum over ranks of a p × p or k × p block: the block itself."""
        return small

    def height(self, p: Tensor) -> int:
        """The number of rows of a whole matrix."""
        return p.shape[-2]

    def mean(self, a: Tensor) -> Tensor:
        """The mean of each matrix, with two dimensions of size 1."""
        return a.mean(dim=(-2, -1), keepdim=True)

    def like(self, p: Tensor, local: Tensor) -> Tensor:
        """``local`` as the same kind of tensor as p."""
        return local


@dataclass(frozen=True)
class RowSharded:
    """The layout of a DTensor sharded by rows (FSDP2): ranks sum small Gram blocks, rows never move.

    The polar retraction needs the sums xᵀx, xᵀu, uᵀu and Fᵀu only (docs/optimizers.md, "On several devices").
    """

    mesh: Any
    placements: tuple[Any, ...]
    dimension: int
    size: int

    @property
    def group(self) -> Any:
        """The ranks that hold the rows of one matrix."""
        return self.mesh.get_group(self.dimension)

    def local(self, p: Tensor) -> Tensor:
        """The rows that this rank stores."""
        rows: Tensor = p.to_local() if is_dtensor(p) else p  # type: ignore[attr-defined]
        return rows

    def rows(self, basis: Tensor) -> Tensor:
        """The rows of a complement that match the stored rows; ranks hold equal chunks, the last ones fewer."""
        chunk = -(-self.size // self.mesh.size(self.dimension))
        start = min(self.mesh.get_local_rank(self.dimension) * chunk, self.size)
        return basis[..., start : start + chunk, :]

    def sum_(self, small: Tensor) -> Tensor:
        """The sum over ranks of a p × p or k × p block, in place."""
        dist.all_reduce(small, group=self.group)
        return small

    def height(self, p: Tensor) -> int:
        """The number of rows of a whole matrix."""
        return self.size

    def mean(self, a: Tensor) -> Tensor:
        """The mean of each matrix over all its rows, with two dimensions of size 1."""
        return self.sum_(a.sum(dim=(-2, -1), keepdim=True)) / (self.size * a.shape[-1])

    def like(self, p: Tensor, local: Tensor) -> Tensor:
        """``local`` as the same kind of tensor as p."""
        from torch.distributed.tensor import DTensor

        sizes: Any = {"shape": p.shape, "stride": p.stride()}
        sharded: Tensor = DTensor.from_local(local, self.mesh, self.placements, run_check=False, **sizes)
        return sharded


Layout = Whole | RowSharded
WHOLE = Whole()


def layout_of(p: Tensor) -> Layout:
    """The layout of p over ranks.

    Raises:
        ValueError: for a DTensor split by columns or over several mesh dimensions.
    """
    if not is_dtensor(p):
        return WHOLE
    placements = tuple(p.placements)  # type: ignore[attr-defined]
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not placements[sharded[0]].is_shard(0):
        raise ValueError(
            f"a point of shape {tuple(p.shape)} is placed as {placements}: its rows may be split over one mesh "
            "dimension (fully_shard's default), nothing else"
        )
    return RowSharded(p.device_mesh, placements, sharded[0], p.shape[0])  # type: ignore[attr-defined]


def is_dtensor(p: Tensor) -> bool:
    """Whether p is a DTensor; does not import torch's module for them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


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
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise RuntimeError(
            f"ranks hold different values of {', '.join(differing[:5])}{more}: "
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
