"""Bytes of the statistics of a pass, before any data are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from manifold_cl.continual.subspaces.directions import OVERSAMPLING, ImportanceMeasurement, LeadingDirections
from manifold_cl.continual.subspaces.growth import parse_sources
from manifold_cl.continual.subspaces.passes import START, Measurement


def memory_pass_nbytes(layers: Mapping[str, nn.Module], *, source: str = "sensitivity", size: int = START) -> int:
    """Bytes of the statistics of the first pass of `grow_memory`, test matrices included.

    Of a union of sources the largest, since each is measured alone. Sketches that do not hold the energy double later.

    >>> memory_pass_nbytes({"layer": nn.Linear(64, 32)})  # one exact moment, 64 x 64 in float32
    16384
    """
    measurements = [ImportanceMeasurement(each, energy=1.0, seed=0, size=size) for each in parse_sources(source)]
    return max(_nbytes(layers, measurement) for measurement in measurements)


def start_pass_nbytes(layers: Mapping[str, nn.Module], rank: int) -> int:
    """Bytes of the sketches of `leading_directions`, test matrices included."""
    return _nbytes(layers, LeadingDirections(rank, protected={}, generator=torch.Generator(), size=OVERSAMPLING * rank))


def _nbytes(layers: Mapping[str, nn.Module], measurement: Measurement[Any]) -> int:
    by_size: dict[int, list[nn.Module]] = {}
    for layer in layers.values():
        by_size.setdefault(min(measurement.size, measurement.limit(layer)), []).append(layer)
    return sum(
        sum(measurement.nbytes(layer, size) for layer in group) + measurement.shared_nbytes(group, size)
        for size, group in by_size.items()
    )
