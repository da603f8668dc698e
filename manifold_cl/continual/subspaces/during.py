"""Importance that is collected in training steps, from their own forward and backward passes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from manifold_cl.adapters.layers import require_layers
from manifold_cl.continual.subspaces.directions import DATA_SOURCES, DataSource, ImportanceMeasurement
from manifold_cl.continual.subspaces.hooks import Collector, hooked, uncompiled
from manifold_cl.continual.subspaces.passes import LazyStatistics, Passes, groups_of
from manifold_cl.continual.subspaces.shared_inputs import SharedInputs
from manifold_cl.continual.subspaces.statistic import Importance, all_reduce

logger = logging.getLogger("manifold_cl")


class TrainingStatistics:
    """The importance of each layer's inputs in the steps that a user chooses: no pass over the data of its own.

    The weights move from step to step, so that the sums mix several models: take the last steps, in which the learning
    rate is small. Sketches keep their size, since the data are not read again.

    >>> import torch
    >>> layer = nn.Linear(8, 4)
    >>> statistics = TrainingStatistics({"layer": layer}, energy=0.9)
    >>> with statistics.collecting():
    ...     loss = layer(torch.eye(8)[:2]).square().sum()
    >>> loss.backward()
    >>> [tuple(importance.shape) for _, importance in statistics.importances()]
    [(8, 8)]

    Args:
        layers: linear layers by name, with or without adapters around them.
        source: as in `measure_importance`.
        energy: share that a sketch should hold; a warning names a layer whose sketch holds less.
        passes: options; ``size``, ``seed``, ``distributed``, ``group`` and ``shared_inputs`` have an effect.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        source: DataSource = "sensitivity",
        energy: float,
        passes: Passes | None = None,
    ) -> None:
        if source not in DATA_SOURCES:
            raise ValueError(f"source is {', '.join(DATA_SOURCES)}, got {source!r}")
        self._passes = passes = passes or Passes()
        self._layers = require_layers(layers)
        self._measurement = ImportanceMeasurement(
            source, energy=energy, seed=passes.seed, size=passes.size, per_sketch=1
        )
        self._shared = SharedInputs() if passes.shared_inputs and self._measurement.of_inputs else None
        sizes = {name: min(passes.size, self._measurement.limit(layer)) for name, layer in self._layers.items()}
        self._statistics = LazyStatistics(self._layers, sizes, self._measurement)
        self._collector = Collector(self._statistics, "skip", self._shared)

    @property
    def batches(self) -> int:
        """Number of forward passes so far."""
        return self._collector.batch + 1

    @property
    def excluded(self) -> Mapping[int, tuple[str, ...]]:
        """Index of a forward pass → layers for which its values were not finite, and were left out."""
        return self._collector.excluded

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A context for the forward pass of one loss; its backward pass, inside or later, adds to the statistics."""
        self._collector.end_batch()
        self._collector.begin_batch()
        with uncompiled(), hooked(self._layers, self._collector.take, shared=self._shared):
            yield

    def importances(self) -> Iterator[tuple[str, Importance]]:
        """Name and importance of each layer, for `SubspaceMemory.extended`; each statistic is deleted after it.

        Raises:
            ValueError: when nothing was collected, or for layers that no gradient reached.
        """
        if not self.batches:
            raise ValueError("nothing was collected: put the loss of at least one training step into collecting()")
        self._collector.end_batch()
        self._collector.require_all(self._layers)
        if self._passes.distributed:
            held = {name: self._statistics[name] for name in self._layers if name in self._statistics}
            all_reduce(held, group=self._passes.group)
        for leader, group in groups_of(self._layers, self._shared).items():
            importance, sufficient = self._measurement.result(self._statistics.pop(leader))
            if not sufficient:
                logger.warning(
                    "%s: a sketch of size %d holds less energy than the threshold", leader, self._passes.size
                )
            for name in group:
                yield name, importance
