"""Running statistics of one layer: their interface, their result, and their sum over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, eq=False)
class Directions:
    """Columns a (n, q) weighted by their length: ``a aᵀ`` is the importance of a layer's inputs, up to a missed part.

    Args:
        columns: the directions, float64, on the layer's device.
        total: energy including the missed part: ``|a|²`` at least, exact or estimated.
    """

    columns: Tensor
    total: float

    @property
    def captured(self) -> float:
        """Share of the energy that the columns hold, in [0, 1]; 1 where there is none."""
        return min(float(self.columns.square().sum()) / self.total, 1.0) if self.total > 0 else 1.0


class Tokens(Directions):
    """Tokens themselves as columns (n, T), fewer than n, in the precision of the statistic: all of the energy."""

    @property
    def captured(self) -> float:
        """1: a sum in float32 may differ from the total by rounding."""
        return 1.0


Importance = Tensor | Directions
"""Importance of a layer's inputs: an exact second moment (n, n), or directions that nearly hold it."""


class Statistic(ABC):
    """A running statistic of one layer, linear in the tokens: parts of the data may be summed anywhere."""

    dtype: torch.dtype = torch.float32
    """Precision of the sums and of the tokens."""
    _sums: Sequence[Tensor]
    _probes: Sequence[Tensor] = ()

    @abstractmethod
    def add(self, x: Tensor, d: Tensor) -> None:
        """Add the tokens of one call of the layer: inputs x (tokens, n) and output gradients d (tokens, m)."""

    @abstractmethod
    def importance(self) -> Importance:
        """The importance of the inputs, by the tokens so far."""

    def sums(self) -> Sequence[Tensor]:
        """The accumulated tensors themselves, which ranks sum in place."""
        return self._sums

    def draws(self) -> float:
        """Sum of the first rows of the random test matrices: equal on ranks with the same matrices."""
        return float(sum(p[0].double().sum() for p in self._probes))

    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(t.nbytes for t in self._sums)


class NoStatistic(Statistic):
    """A statistic that sums nothing, for a pass that only observes which layers are called."""

    _sums = ()

    def add(self, x: Tensor, d: Tensor) -> None:
        """Do nothing."""

    def importance(self) -> Importance:
        """Raise TypeError: there is none."""
        raise TypeError("nothing was summed")


def all_reduce(statistics: Mapping[str, Statistic], *, group: dist.ProcessGroup | None = None) -> None:
    """Replace the sums of every rank by those over all ranks, in place and in their own precision.

    Sums are linear, so data parallelism changes only rounding. Every rank must have the same layers in the same order,
    with test matrices from the same seed.

    Raises:
        ValueError: when ranks drew different test matrices.
    """
    if not statistics:
        return
    device = next(iter(statistics.values())).sums()[0].device
    draws = torch.tensor([s.draws() for s in statistics.values()], dtype=torch.float64, device=device)
    both = torch.stack([draws, -draws])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(both[0], -both[1]):
        name = [*statistics][int((both[0] != -both[1]).nonzero()[0])]
        raise ValueError(f"ranks drew different test matrices for {name}: give every rank the same seed")
    for statistic in statistics.values():
        for total in statistic.sums():
            dist.all_reduce(total, group=group)
