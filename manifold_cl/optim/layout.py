"""Where the rows of a parameter live: all here, or a part on each rank (FSDP2)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whole:
    """An ordinary tensor: every row is here."""

    def local(self, p: Tensor) -> Tensor:
        """The tensor itself."""
        return p

    def rows(self, basis: Tensor) -> Tensor:
        """The rows of a complement that belong to the rows here: all."""
        return basis

    def sum_(self, small: Tensor) -> Tensor:
        """The sum over ranks of a p × p or k × p block, in place: nothing to add."""
        return small

    def like(self, p: Tensor, local: Tensor) -> Tensor:
        """``local`` as a tensor of the kind of p."""
        return local


@dataclass(frozen=True)
class RowSharded:
    """A DTensor sharded by rows: Gram blocks are summed over the ranks, rows never move.

    Source: geometry.md 4.9 (the polar retraction needs xᵀx, xᵀu, uᵀu and Fᵀu only).
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
        """This rank's rows."""
        rows: Tensor = p.to_local() if is_dtensor(p) else p  # type: ignore[attr-defined]
        return rows

    def rows(self, basis: Tensor) -> Tensor:
        """The rows of a complement that belong to the rows here; ranks hold equal chunks, the last ones fewer."""
        chunk = -(-self.size // self.mesh.size(self.dimension))
        start = min(self.mesh.get_local_rank(self.dimension) * chunk, self.size)
        return basis[..., start : start + chunk, :]

    def sum_(self, small: Tensor) -> Tensor:
        """The sum over ranks of a p × p or k × p block, in place."""
        torch.distributed.all_reduce(small, group=self.group)
        return small

    def like(self, p: Tensor, local: Tensor) -> Tensor:
        """``local`` as a tensor of the kind of p."""
        from torch.distributed.tensor import DTensor

        whole: Tensor = DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        return whole


Layout = Whole | RowSharded
WHOLE = Whole()


def layout_of(p: Tensor) -> Layout:
    """How p is laid out over ranks.

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
    """Whether p is a DTensor; torch's module for them is not imported for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)
