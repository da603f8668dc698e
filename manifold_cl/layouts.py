"""Where the rows of a parameter are stored: all here, or spread over ranks, which then sum small blocks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


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
