"""Passes over the data: as many layers at once as the memory budget allows, sketches that grow until they suffice."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Generic, Literal, TypeVar

from torch import distributed as dist
from torch import nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import require_layers
from manifold_cl.continual.losses import Losses, start_pass
from manifold_cl.continual.subspaces.gradient_sketches import Probes, RangeSketch
from manifold_cl.continual.subspaces.hooks import OnNonfinite, PassReport, collect_statistics
from manifold_cl.continual.subspaces.shared_inputs import SharedInputs
from manifold_cl.continual.subspaces.statistic import NoStatistic, Statistic, all_reduce

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
        shared_inputs: layers that receive the same input tensor, such as query, key and value, have one statistic of
            their inputs, computed and held once (docs/subspaces.md, "Shared inputs"). Sketches of gradients stay per
            layer.
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
    shared_inputs: bool = False

    def __post_init__(self) -> None:
        if self.per_sketch not in (None, 1, 2):
            raise ValueError(f"per_sketch is 1 or 2, got {self.per_sketch!r}")


class Measurement(ABC, Generic[_T]):
    """The statistic of a layer, its memory, and the result that is read off in the end."""

    size: int
    """Size of sketches at the start."""
    of_inputs: bool = False
    """Whether the statistic depends on inputs and gradient norms alone, so that layers may share it."""
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

    Layers with one statistic (`Passes.shared_inputs`) follow each other and get the same object.

    Raises:
        TypeError: for a layer that is not linear.
        ValueError: where one layer alone exceeds the memory budget. See `collect_statistics` for errors of the data.
    """
    layers = require_layers(layers)
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
    shared = SharedInputs() if passes.shared_inputs and measurement.of_inputs else None
    if shared is not None and budget < math.inf:
        find_shared_inputs(layers, losses, shared)
    numbers = count(1)
    while sizes:
        chosen = {name: layers[name] for name in _fitting(layers, sizes, measurement, budget, shared)}
        measurement.forget()
        statistics = LazyStatistics(chosen, sizes, measurement)
        if shared is None:
            statistics.make_all()
        _read(chosen, losses, statistics, passes, next(numbers), shared)
        if any(isinstance(s, RangeSketch) for s in statistics.values()):
            for name in chosen:  # one at a time: each range sketch is deleted before the next refined one is made
                first = statistics.pop(name)
                assert isinstance(first, RangeSketch)
                statistics[name] = first.refined()
                del first
            measurement.forget()
            _read(chosen, losses, statistics, passes, next(numbers))
        for leader, group in groups_of(chosen, shared).items():
            result, sufficient = measurement.result(statistics.pop(leader))
            larger = min(2 * sizes[leader], largest[leader])
            grows = not sufficient and larger > sizes[leader]
            if grows and measurement.needed_nbytes(layers[leader], larger) <= budget:
                sizes.update(dict.fromkeys(group, larger))
                continue
            if not sufficient:
                logger.warning("%s: a sketch of size %d holds less energy than the threshold", leader, sizes[leader])
            for name in group:
                del sizes[name]
                yield name, result


class LazyStatistics(dict[str, Statistic]):
    """Layer → its statistic, made when it is first used: of layers that share one, only that of the first is made."""

    def __init__(
        self, layers: Mapping[str, nn.Module], sizes: Mapping[str, int], measurement: Measurement[Any]
    ) -> None:
        super().__init__()
        self._make = {name: partial(measurement.statistic, name, layer, sizes[name]) for name, layer in layers.items()}

    def __missing__(self, name: str) -> Statistic:
        self[name] = self._make[name]()
        return self[name]

    def make_all(self) -> None:
        """Make all of them, in the order of the layers, which random draws depend on."""
        for name in self._make:
            self[name]


def find_shared_inputs(layers: Mapping[str, nn.Module], losses: Losses, shared: SharedInputs) -> None:
    """Find the groups of layers that receive the same input, by the first batch with a finite loss alone."""
    statistics = {name: NoStatistic() for name in layers}
    for loss in start_pass(losses):
        with suppress(FloatingPointError):  # the pass itself will report it
            collect_statistics(layers, [loss], statistics, on_nonfinite="skip", shared=shared)
            return


def groups_of(layers: Iterable[str], shared: SharedInputs | None) -> dict[str, list[str]]:
    """First layer → the layers of its group, itself included."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(name if shared is None else shared.leader(name), []).append(name)
    return groups


def _read(
    layers: Mapping[str, nn.Module],
    losses: Losses,
    statistics: Mapping[str, Statistic],
    passes: Passes,
    number: int,
    shared: SharedInputs | None = None,
) -> None:
    on_batch = None if passes.on_batch is None else partial(passes.on_batch, number)
    report = collect_statistics(
        layers, start_pass(losses), statistics, on_nonfinite=passes.on_nonfinite, on_batch=on_batch, shared=shared
    )
    if passes.on_pass is not None:
        passes.on_pass(report)
    if passes.distributed:
        ordered = {name: statistics[name] for name in layers if name in statistics}  # the same on every rank
        all_reduce(ordered, group=passes.group)


def _fitting(
    layers: Mapping[str, nn.Module],
    sizes: Mapping[str, int],
    measurement: Measurement[_T],
    budget: float,
    shared: SharedInputs | None,
) -> list[str]:
    """The first layers that fit into the budget together; the layers of a group count once."""
    if budget == math.inf:
        return list(sizes)
    chosen: list[str] = []
    own = 0
    by_size: dict[int, list[nn.Module]] = {}
    for name, group in groups_of(sizes, shared).items():
        more = own + measurement.nbytes(layers[name], sizes[name])
        tried = {size: list(others) for size, others in by_size.items()}
        tried.setdefault(sizes[name], []).append(layers[name])
        if more + sum(measurement.shared_nbytes(others, size) for size, others in tried.items()) <= budget:
            chosen.extend(group)
            own, by_size = more, tried
    return chosen
