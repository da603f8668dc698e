"""Passes over the data: as many layers at once as the memory budget allows, sketches that grow until they suffice."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from torch import distributed as dist
from torch import nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import require_linear
from manifold_cl.continual.losses import Losses
from manifold_cl.continual.subspaces.gradient_sketches import RangeSketch
from manifold_cl.continual.subspaces.hooks import OnNonfinite, PassReport, collect_statistics
from manifold_cl.continual.subspaces.statistic import Statistic, all_reduce

logger = logging.getLogger("manifold_cl")

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Passes:
    """How the data are read.

    Args:
        memory_budget: bytes that the statistics of one pass may take, test matrices included; layers that do not fit
            together are served in several passes. None serves all at once.
        per_sketch: passes per gradient sketch, 1 or 2; a second one squares the errors (`RefinedSketch`). None is 2 for
            a memory and 1 for the start of a task.
        max_size: largest size of a sketch; None for the size at which it is exact.
        on_nonfinite: see `collect_statistics`.
        on_batch: called with the pass and the number of batches of it, both from 1.
        on_pass: called with each pass's `PassReport`.
        distributed: every rank brings its own part of the data, and statistics are added up over the ranks.
        group: these ranks; None means all of them.
    """

    memory_budget: int | None = None
    per_sketch: Literal[1, 2] | None = None
    max_size: int | None = None
    on_nonfinite: OnNonfinite = "raise"
    on_batch: Callable[[int, int], None] | None = None
    on_pass: Callable[[PassReport], None] | None = None
    distributed: bool = False
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.per_sketch not in (None, 1, 2):
            raise ValueError(f"per_sketch is 1 or 2, got {self.per_sketch!r}")


class Measurement(ABC, Generic[_Found]):
    """How a layer is watched, what that costs, and what is read off in the end."""

    size: int
    """Of sketches at the start."""

    @abstractmethod
    def nbytes(self, layer: nn.Module, size: int) -> int:
        """Memory of one layer's statistic."""

    def shared_nbytes(self, layers: Iterable[nn.Module], size: int) -> int:
        """Memory of the test matrices that these layers share."""
        return 0

    def forget(self) -> None:
        """Let go of test matrices, which the next pass may not need."""

    @abstractmethod
    def statistic(self, name: str, layer: nn.Module, size: int) -> Statistic:
        """A fresh one."""

    @abstractmethod
    def found(self, name: str, statistic: Statistic) -> tuple[_Found, bool]:
        """What the statistic amounts to, and whether that is enough."""

    def limit(self, layer: nn.Module) -> int:
        """The size beyond which a sketch of this layer cannot improve."""
        return min(sides(layer))


def run_passes(
    layers: Mapping[str, nn.Module], losses: Losses, recipe: Measurement[_Found], passes: Passes
) -> Iterator[tuple[str, _Found]]:
    """What each layer's statistic amounts to, as soon as it is known, so that no more than one pass's need exist.

    Raises:
        TypeError: for a layer that is not linear.
        ValueError: where one layer alone exceeds the memory budget; see `collect_statistics` for the data.
    """
    layers = {name: require_linear(name, layer) for name, layer in layers.items()}
    sizes = {name: min(recipe.size, _cap(recipe, layer, passes)) for name, layer in layers.items()}
    for name, layer in layers.items():
        if not _fits(recipe, layer, sizes[name], passes.memory_budget):
            need = recipe.nbytes(layer, sizes[name]) + recipe.shared_nbytes([layer], sizes[name])
            raise ValueError(
                f"the statistic of {name} alone takes {need} bytes, the memory budget is {passes.memory_budget}: "
                "raise the budget or lower the sketch size"
            )
    count = 0
    while sizes:
        chosen = _fitting(layers, sizes, recipe, passes.memory_budget)
        part = {name: layers[name] for name in chosen}
        recipe.forget()
        statistics = {name: recipe.statistic(name, layer, sizes[name]) for name, layer in part.items()}
        for look in range(2 if any(isinstance(s, RangeSketch) for s in statistics.values()) else 1):
            if look:
                for name in chosen:  # one at a time: each first look makes room for its second
                    first = statistics.pop(name)
                    assert isinstance(first, RangeSketch)
                    statistics[name] = first.refined()
                    del first
                recipe.forget()
            count += 1
            reading = collect_statistics(
                part,
                losses(),
                statistics,
                on_nonfinite=passes.on_nonfinite,
                on_batch=_counted(passes.on_batch, count),
            )
            if passes.on_pass is not None:
                passes.on_pass(reading)
            if passes.distributed:
                all_reduce(statistics, group=passes.group)
        for name, layer in part.items():
            found, enough = recipe.found(name, statistics.pop(name))
            larger = min(2 * sizes[name], _cap(recipe, layer, passes))
            if not enough and larger > sizes[name] and _fits(recipe, layer, larger, passes.memory_budget):
                sizes[name] = larger
                continue
            if not enough:
                logger.warning("%s: a sketch of size %d holds less energy than was asked for", name, sizes[name])
            del sizes[name]
            yield name, found


def _fitting(
    layers: Mapping[str, nn.Module], sizes: Mapping[str, int], recipe: Measurement[_Found], budget: int | None
) -> list[str]:
    """The first layers that fit into the budget together."""
    if budget is None:
        return list(sizes)
    chosen: list[str] = []
    own = 0
    for name, size in sizes.items():
        more = own + recipe.nbytes(layers[name], size)
        by_size: dict[int, list[nn.Module]] = {}
        for other in (*chosen, name):
            by_size.setdefault(sizes[other], []).append(layers[other])
        need = more + sum(recipe.shared_nbytes(group, size) for size, group in by_size.items())
        if need <= budget:
            chosen.append(name)
            own = more
    return chosen


def _fits(recipe: Measurement[_Found], layer: nn.Module, size: int, budget: int | None) -> bool:
    return budget is None or recipe.nbytes(layer, size) + recipe.shared_nbytes([layer], size) <= budget


def _cap(recipe: Measurement[_Found], layer: nn.Module, passes: Passes) -> int:
    limit = recipe.limit(layer)
    return limit if passes.max_size is None else min(limit, passes.max_size)


def _counted(on_batch: Callable[[int, int], None] | None, count: int) -> Callable[[int], None] | None:
    return None if on_batch is None else lambda batch: on_batch(count, batch)
