"""What a task relies on in each layer, and along which directions its adapters start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import Targets, stored_weight, target_linears
from manifold_cl.continual.losses import Losses, task_losses
from manifold_cl.continual.subspaces.capacity import require_entries
from manifold_cl.continual.subspaces.gradient_sketches import (
    CHECKS,
    GradientSketch,
    Probes,
    RangeSketch,
    RefinedSketch,
    SingularTriplets,
)
from manifold_cl.continual.subspaces.input_moments import InputMoment, InputSketch
from manifold_cl.continual.subspaces.passes import Measurement, Passes, run_passes
from manifold_cl.continual.subspaces.statistic import Importance, Statistic
from manifold_cl.continual.task import Task
from manifold_cl.geometry import ProtectedSubspace

EXACT = 2048
"""Up to this width a layer's n × n moment (16 MB) is kept exactly, and its sketch has test matrices of its own."""
START = 128
"""Size that sketches start from; one that does not hold the energy doubles."""
OVERSAMPLING = 4
"""Sketch size over rank: at four times the rank the leading directions are exact for any decaying spectrum
(method.md 6.11)."""

DataSource = Literal["sensitivity", "activation", "gradient"]
DATA_SOURCES: tuple[DataSource, ...] = ("sensitivity", "activation", "gradient")


class ImportanceMeasurement(Measurement[Importance]):
    """Statistics of what a memory protects: exact moments of narrow layers, sketches of the rest.

    Args:
        source: ``"activation"``, ``"sensitivity"`` (inputs weighted by their squared loss gradient) or ``"gradient"``.
        energy: share of the energy that a sketch must catch.
        seed: of the test matrices.
        size: ℓ at the start.
        per_sketch: how often the data are read for a gradient.
    """

    def __init__(
        self, source: DataSource, *, energy: float, seed: int, size: int = START, per_sketch: Literal[1, 2] = 2
    ) -> None:
        self.source, self.energy, self.size, self.per_sketch = source, energy, size, per_sketch
        self._probes = Probes(seed)

    def nbytes(self, layer: nn.Module, size: int) -> int:
        """Memory of one layer's statistic."""
        m, n = sides(layer)
        if self.source == "gradient":
            return (RangeSketch if self.per_sketch == 2 else GradientSketch).bytes_for(m, n, size)
        return InputMoment.bytes_for(n) if self._exact(n, size) else InputSketch.bytes_for(n, size)

    def shared_nbytes(self, layers: Iterable[nn.Module], size: int) -> int:
        """Memory of the shared test matrices."""
        shapes = {sides(layer) for layer in layers}
        if self.source == "gradient":
            return _probe_bytes(shapes, size, per_sketch=self.per_sketch)
        return sum(4 * n * size for n in {n for _, n in shapes} if not self._exact(n, size))

    def forget(self) -> None:
        """Let go of the test matrices."""
        self._probes.forget()

    def statistic(self, name: str, layer: nn.Module, size: int) -> Statistic:
        """A fresh one."""
        (_, n), weight = sides(layer), stored_weight(layer)
        if self.source == "gradient":
            return _gradient_sketch(layer, size, self._probes, per_sketch=self.per_sketch)
        weighted = self.source == "sensitivity"
        if self._exact(n, size):
            return InputMoment(n, weighted=weighted, device=weight.device, dtype=_dtype(weight))
        return InputSketch(
            n, size=size, probes=self._probes, weighted=weighted, device=weight.device, dtype=_dtype(weight)
        )

    def found(self, name: str, statistic: Statistic) -> tuple[Importance, bool]:
        """Moment or directions; enough when they catch the energy."""
        importance = statistic.importance()
        return importance, isinstance(importance, Tensor) or importance.captured >= self.energy

    def limit(self, layer: nn.Module) -> int:
        """All directions of a gradient; half of the inputs, where the exact moment takes over."""
        return super().limit(layer) if self.source == "gradient" else sides(layer)[1]

    @staticmethod
    def _exact(n: int, size: int) -> bool:
        return n <= EXACT or 2 * size >= n


class LeadingDirections(Measurement[SingularTriplets]):
    """Sketches of the gradient outside a protected subspace, and their first ``rank`` triplets."""

    def __init__(
        self,
        rank: int,
        *,
        protected: Mapping[str, ProtectedSubspace],
        generator: torch.Generator,
        size: int,
        per_sketch: Literal[1, 2] = 1,
    ) -> None:
        self.rank, self.size, self.per_sketch = rank, size, per_sketch
        self._protected, self._generator = protected, generator
        self._probes: Probes | None = None

    def nbytes(self, layer: nn.Module, size: int) -> int:
        """Memory of one layer's sketch."""
        m, n = sides(layer)
        if self.per_sketch == 2:
            return RangeSketch.bytes_for(m, n, size)
        return GradientSketch.bytes_for(m, n, size, own_probes=_is_small(layer))

    def shared_nbytes(self, layers: Iterable[nn.Module], size: int) -> int:
        """Memory of the test matrices that layers share."""
        sharing = {sides(layer) for layer in layers if self.per_sketch == 2 or not _is_small(layer)}
        return _probe_bytes(sharing, size, per_sketch=self.per_sketch)

    def forget(self) -> None:
        """Let go of the test matrices."""
        if self._probes is not None:
            self._probes.forget()

    def statistic(self, name: str, layer: nn.Module, size: int) -> Statistic:
        """A fresh sketch. Test matrices of large layers are shared: own ones would quadruple a sketch's memory."""
        subspace = self._protected.get(name)
        complement = None if subspace is None else subspace.basis.to(stored_weight(layer).device)
        if self.per_sketch == 1 and _is_small(layer):
            return _gradient_sketch(layer, size, self._generator, per_sketch=1, complement=complement)
        if self._probes is None:
            self._probes = Probes(_seed(self._generator))
        return _gradient_sketch(layer, size, self._probes, per_sketch=self.per_sketch, complement=complement)

    def found(self, name: str, statistic: Statistic) -> tuple[SingularTriplets, bool]:
        """The leading triplets, always enough."""
        assert isinstance(statistic, GradientSketch | RefinedSketch)
        left, sigma, right = statistic.triplets()
        return SingularTriplets(left[:, : self.rank], sigma[: self.rank], right[:, : self.rank]), True


def measure_importance(
    layers: Mapping[str, nn.Module],
    losses: Losses,
    *,
    source: DataSource,
    energy: float,
    generator: torch.Generator,
    passes: Passes | None = None,
    size: int = START,
) -> Iterator[tuple[str, Importance]]:
    """What each layer relies on, one after the other: the input of `SubspaceMemory.extended`.

    Args:
        layers: linear layers by name, with or without adapters around them.
        losses: starts a pass over the data.
        source: see `ImportanceMeasurement`.
        energy: share of the energy that a sketch must catch; one that does not is taken again at twice its size.
        generator: of test matrices.
        passes: how the data are read; by default twice for a gradient, of which one look would protect too much.
        size: of sketches at the start.
    """
    if source not in DATA_SOURCES:
        raise ValueError(f"source is {', '.join(DATA_SOURCES)}, got {source!r}")
    passes = passes or Passes()
    recipe = ImportanceMeasurement(
        source, energy=energy, seed=_seed(generator), size=size, per_sketch=passes.per_sketch or 2
    )
    return run_passes(layers, losses, recipe, passes)


def leading_directions(
    layers: Mapping[str, nn.Module],
    losses: Losses,
    rank: int,
    protected: Mapping[str, ProtectedSubspace] | None = None,
    *,
    generator: torch.Generator,
    passes: Passes | None = None,
) -> dict[str, SingularTriplets]:
    """The leading ``rank`` singular triplets of each layer's gradient outside what is protected.

    Args:
        layers: linear layers by name, with or without adapters around them.
        losses: starts a pass over the data.
        rank: how many; sketches have four times this size.
        protected: layer → subspace that the right directions avoid; none, or one for every layer.
        generator: of test matrices.
        passes: how the data are read; by default once.
    """
    if rank < 1:
        raise ValueError(f"the rank is at least 1, got {rank}")
    passes = passes or Passes()
    if protected:
        require_entries(protected, layers)
    recipe = LeadingDirections(
        rank,
        protected=protected or {},
        generator=generator,
        size=OVERSAMPLING * rank,
        per_sketch=passes.per_sketch or 1,
    )
    return dict(run_passes(layers, losses, recipe, passes))


def task_directions(
    model: nn.Module,
    task: Task | Iterable[Any],
    targets: Targets,
    rank: int,
    protected: Mapping[str, ProtectedSubspace] | None = None,
    *,
    examples: int = 160,
    batch_size: int = 16,
    seed: int = 0,
    passes: Passes | None = None,
) -> dict[str, SingularTriplets]:
    """The leading left and right directions of a task's gradient outside ``protected``: where its adapters start.

    Args:
        model: frozen or not, in wrappers of PEFT or torch.compile or not; no gradient of a weight is made.
        task: whose training loss is descended, or its batches; see `task_losses`.
        targets: linear layers, as in `target_linears`, by their names in the model without wrappers.
        rank: how many directions a layer.
        protected: a `SubspaceMemory`, or layer → subspace: none, or one for every layer.
        examples: random training examples to read, at least one batch.
        batch_size: how many at once.
        seed: of the examples and the test matrices.
        passes: how the data are read.

    Raises:
        ValueError: for a target without a match (the nearest names are listed), no data, layers without a gradient, or
            a memory that lacks some of the layers.
        TypeError: for batches that are no dictionaries of tensors.
    """
    layers = target_linears(model, targets)
    draw = torch.Generator().manual_seed(seed)
    return leading_directions(
        layers,
        task_losses(model, task, examples=examples, batch_size=batch_size, seed=seed),
        rank,
        protected,
        generator=draw,
        passes=passes,
    )


def _gradient_sketch(
    layer: nn.Module,
    size: int,
    draw: torch.Generator | Probes,
    *,
    per_sketch: Literal[1, 2],
    complement: Tensor | None = None,
) -> Statistic:
    m, n = sides(layer)
    weight = stored_weight(layer)
    device, dtype = weight.device, _dtype(weight)
    if per_sketch == 2:
        assert isinstance(draw, Probes)
        return RangeSketch(m, n, size=size, probes=draw, complement=complement, device=device, dtype=dtype)
    return GradientSketch(m, n, size=size, generator=draw, complement=complement, device=device, dtype=dtype)


def _probe_bytes(shapes: set[tuple[int, int]], size: int, *, per_sketch: Literal[1, 2]) -> int:
    """Memory of the Gaussian matrices that gradient sketches of these shapes share."""
    wide = {(n, min(size, m, n)) for m, n in shapes}
    tall = {(m, min(size, m, n)) for m, n in shapes}
    if per_sketch == 2:
        return 4 * (sum(n * columns for n, columns in wide) + CHECKS * sum({m for m, _ in shapes}))
    return 4 * sum(rows * (3 * columns + 1 + CHECKS) for rows, columns in (*wide, *tall))


def _is_small(layer: nn.Module) -> bool:
    return max(sides(layer)) <= EXACT


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
