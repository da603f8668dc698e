"""Passes over the data: as many layers at once as the memory budget allows, sketches that grow until they suffice."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Generic, Literal, TypeVar

from torch import distributed as dist
from torch import nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import require_linear
from manifold_cl.continual.losses import Losses
from manifold_cl.continual.subspaces.gradient_sketches import Probes, RangeSketch
from manifold_cl.continual.subspaces.hooks import OnNonfinite, PassReport, collect_statistics
from manifold_cl.continual.subspaces.statistic import Statistic, all_reduce

logger = logging.getLogger("manifold_cl")

START = 128
"""Size of sketches at the start; a sketch that does not hold the energy doubles."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Passes:
    """Options of the passes over the data.

    Args:
        memory_budget: bytes for the statistics of one pass, test matrices included. Layers that do not fit together
            are read in several passes; None reads all at once.
        per_sketch: passes per gradient sketch, 1 or 2; a second one squares the errors (`RefinedSketch`). None is 2 for
            a memory and 1 for the start of a task.
        size: of the sketches for a memory at the start.
        max_size: largest size of a sketch; None for the size at which it is exact.
        seed: of the test matrices.
        on_nonfinite: as in `collect_statistics`.
        on_batch: called with the number of the pass and of its batch, both from 1.
        on_pass: called with each pass's `PassReport`.
        distributed: every rank reads its own part of the data, and statistics are summed over the ranks.
        group: these ranks; None for all.
    """

    memory_budget: int | None = None
    per_sketch: Literal[1, 2] | None = None
    size: int = START
    max_size: int | None = None
    seed: int = 0
    on_nonfinite: OnNonfinite = "raise"
    on_batch: Callable[[int, int], None] | None = None
    on_pass: Callable[[PassReport], None] | None = None
    distributed: bool = False
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.per_sketch not in (None, 1, 2):
            raise ValueError(f"per_sketch is 1 or 2, got {self.per_sketch!r}")


class Measurement(ABC, Generic[_T]):
    """The statistic of a layer, its memory, and the result that is read off in the end."""

    size: int
    """Size of sketches at the start."""
    _probes: Probes | None = None

    @abstractmethod
    def nbytes(self, layer: nn.Module, size: int) -> int:
        """Bytes of one layer's statistic."""

    @abstractmethod
    def shared_nbytes(self, layers: Iterable[nn.Module], size: int) -> int:
        """Bytes of the test matrices that these layers share."""

    def forget(self) -> None:
        """Delete the test matrices, which the next pass may not need."""
        if self._probes is not None:
            self._probes.forget()

    @abstractmethod
    def statistic(self, name: str, layer: nn.Module, size: int) -> Statistic:
        """A new statistic of one layer."""

    @abstractmethod
    def result(self, statistic: Statistic) -> tuple[_T, bool]:
        """The result, and whether the size of the statistic was sufficient."""

    def limit(self, layer: nn.Module) -> int:
        """Largest useful size: the rank that a layer's gradient can have."""
        return min(sides(layer))

    def needed_nbytes(self, layer: nn.Module, size: int) -> int:
        """Bytes for one layer alone."""
        return self.nbytes(layer, size) + self.shared_nbytes([layer], size)


def run_passes(
    layers: Mapping[str, nn.Module], losses: Losses, measurement: Measurement[_T], passes: Passes
) -> Iterator[tuple[str, _T]]:
    """Name and result of each layer after its pass, so that only one pass's results exist at once.

    Raises:
        TypeError: for a layer that is not linear.
        ValueError: where one layer alone exceeds the memory budget. See `collect_statistics` for errors of the data.
    """
    layers = {name: require_linear(name, layer) for name, layer in layers.items()}
    limits = {name: measurement.limit(layer) for name, layer in layers.items()}
    largest = limits if passes.max_size is None else {name: min(n, passes.max_size) for name, n in limits.items()}
    sizes = {name: min(measurement.size, limit) for name, limit in largest.items()}
    budget = math.inf if passes.memory_budget is None else passes.memory_budget
    for name, layer in layers.items():
        if (need := measurement.needed_nbytes(layer, sizes[name])) > budget:
            raise ValueError(
                f"the statistic of {name} alone takes {need} bytes, the memory budget is {budget}: "
                "raise the budget or lower the sketch size"
            )
    numbers = count(1)
    while sizes:
        chosen = {name: layers[name] for name in _fitting(layers, sizes, measurement, budget)}
        measurement.forget()
        statistics = {name: measurement.statistic(name, layer, sizes[name]) for name, layer in chosen.items()}
        _read(chosen, losses, statistics, passes, next(numbers))
        if any(isinstance(s, RangeSketch) for s in statistics.values()):
            for name in chosen:  # one at a time: each range sketch is deleted before the next refined one is made
                first = statistics.pop(name)
                assert isinstance(first, RangeSketch)
                statistics[name] = first.refined()
                del first
            measurement.forget()
            _read(chosen, losses, statistics, passes, next(numbers))
        for name, layer in chosen.items():
            result, sufficient = measurement.result(statistics.pop(name))
            larger = min(2 * sizes[name], largest[name])
            if not sufficient and larger > sizes[name] and measurement.needed_nbytes(layer, larger) <= budget:
                sizes[name] = larger
                continue
            if not sufficient:
                logger.warning("%s: a sketch of size %d holds less energy than the threshold", name, sizes[name])
            del sizes[name]
            yield name, result


def _read(
    layers: Mapping[str, nn.Module], losses: Losses, statistics: Mapping[str, Statistic], passes: Passes, number: int
) -> None:
    on_batch = None if passes.on_batch is None else partial(passes.on_batch, number)
    report = collect_statistics(layers, losses(), statistics, on_nonfinite=passes.on_nonfinite, on_batch=on_batch)
    if passes.on_pass is not None:
        passes.on_pass(report)
    if passes.distributed:
        all_reduce(statistics, group=passes.group)


def _fitting(
    layers: Mapping[str, nn.Module], sizes: Mapping[str, int], measurement: Measurement[_T], budget: float
) -> list[str]:
    """The first layers that fit into the budget together."""
    if budget == math.inf:
        return list(sizes)
    chosen: list[str] = []
    own = 0
    for name, size in sizes.items():
        more = own + measurement.nbytes(layers[name], size)
        by_size: dict[int, list[nn.Module]] = {}
        for other in (*chosen, name):
            by_size.setdefault(sizes[other], []).append(layers[other])
        if more + sum(measurement.shared_nbytes(group, size) for size, group in by_size.items()) <= budget:
            chosen.append(name)
            own = more
    return chosen
