"""What a running statistic of one layer is, what it amounts to, and how ranks add theirs up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, eq=False)
class Directions:
    """Columns a (n, q) weighted by their length, so that ``a aᵀ`` is what a layer relies on, up to what they miss.

    Args:
        columns: the directions, float64, on the layer's device.
        total: energy of everything, what the columns miss included: ``|a|²`` at least, exact or estimated.
    """

    columns: Tensor
    total: float

    @property
    def captured(self) -> float:
        """Share of the energy that the columns hold, in [0, 1]; 1 where there is none."""
        return min(float(self.columns.square().sum()) / self.total, 1.0) if self.total > 0 else 1.0


Importance = Tensor | Directions
"""What a layer relies on: an exact second moment (n, n) of its inputs, or directions that nearly hold it."""


class Statistic(ABC):
    """A running statistic of one layer, linear in the tokens: parts of the data may be summed anywhere."""

    dtype: torch.dtype = torch.float32
    """What it is summed in, and what tokens come in."""

    @abstractmethod
    def add(self, x: Tensor, d: Tensor) -> None:
        """Take in tokens of one call of the layer: inputs x (tokens, n) and output gradients d (tokens, m)."""

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The accumulated tensors themselves: what a rank adds to the other ranks' in place."""

    @abstractmethod
    def importance(self) -> Importance:
        """What the layer relies on, by the tokens so far."""

    def draws(self) -> float:
        """A number that tells random test matrices apart; 0 for a statistic without any."""
        return 0.0

    def nbytes(self) -> int:
        """Memory of the sums."""
        return sum(t.numel() * t.element_size() for t in self.sums())


def all_reduce(statistics: Mapping[str, Statistic], *, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the statistic of all ranks' tokens: sums are added up in place, float32 as they are.

    Linear sums make this exact: data parallelism changes rounding and nothing else. Every rank must hold the same
    layers in the same order, with test matrices from the same seed.

    Raises:
        ValueError: when ranks drew different test matrices, whose sums mean nothing together.
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
