"""Protected directions of a task in each layer, and the directions along which its adapters start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import Targets, stored_weight, target_linears
from manifold_cl.continual.losses import Losses, start_pass, task_losses
from manifold_cl.continual.subspaces.capacity import validate_entries
from manifold_cl.continual.subspaces.gradient_sketches import (
    CHECKS,
    GradientSketch,
    Probes,
    RangeSketch,
    RefinedSketch,
    SingularTriplets,
)
from manifold_cl.continual.subspaces.hooks import collect_statistics
from manifold_cl.continual.subspaces.input_moments import FewTokens, InputMoment, InputSketch
from manifold_cl.continual.subspaces.passes import START, Measurement, Passes, run_passes
from manifold_cl.continual.subspaces.statistic import Importance, Statistic
from manifold_cl.continual.task import Task
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.rules import validate_whole

WIDE = 1024
"""Width of a layer from which an eigendecomposition takes a tenth of a second or more on one core (0.4 s at 1536)."""
EXACT = 2048
"""Largest width of a layer with an exact n × n moment (16 MB), and with a sketch's own test matrices."""
OVERSAMPLING = 4
"""Sketch size over rank: with four times the rank the leading directions of any decaying spectrum are exact
(docs/deviations.md, "The memory", deviation 13)."""

DataSource = Literal["sensitivity", "activation", "gradient"]
DATA_SOURCES: tuple[DataSource, ...] = get_args(DataSource)


class ImportanceMeasurement(Measurement[Importance]):
    """Importance for a memory: exact moments of narrow layers, sketches of wide layers and of gradients.

    Arguments are those of `measure_importance` and `Passes`.
    """

    def __init__(
        self, source: DataSource, *, energy: float, seed: int, size: int = START, per_sketch: Literal[1, 2] = 2
    ) -> None:
        self.source, self.energy, self.size, self.per_sketch = source, energy, size, per_sketch
        self.of_inputs = source != "gradient"
        self._probes: Probes = Probes(seed)

    def nbytes(self, layer: nn.Module, size: int) -> int:
        """Bytes of one layer's statistic."""
        m, n = sides(layer)
        if self.source == "gradient":
            return (RangeSketch if self.per_sketch == 2 else GradientSketch).bytes_for(m, n, size)
        return InputMoment.bytes_for(n) if self._exact(n, size) else InputSketch.bytes_for(n, size)

    def shared_nbytes(self, layers: Iterable[nn.Module], size: int) -> int:
        """Bytes of the shared test matrices."""
        shapes = {sides(layer) for layer in layers}
        if self.source == "gradient":
            return _probe_bytes(shapes, size, per_sketch=self.per_sketch)
        return sum(4 * n * size for n in {n for _, n in shapes} if not self._exact(n, size))

    def statistic(self, name: str, layer: nn.Module, size: int) -> Statistic:
        """A new statistic of one layer."""
        n = sides(layer)[1]
        if self.source == "gradient":
            return _gradient_sketch(layer, size, self._probes, per_sketch=self.per_sketch)
        weighted, like = self.source == "sensitivity", _like(layer)
        if self._exact(n, size):
            return (FewTokens if n >= WIDE else InputMoment)(n, weighted=weighted, **like)
        return InputSketch(n, size=size, probes=self._probes, weighted=weighted, **like)

    def result(self, statistic: Statistic) -> tuple[Importance, bool]:
        """Moment or directions; sufficient where they hold the energy."""
        importance = statistic.importance()
        return importance, isinstance(importance, Tensor) or importance.captured >= self.energy

    def limit(self, layer: nn.Module) -> int:
        """All directions of a gradient; all inputs otherwise, though the exact moment replaces sketches of a half."""
        return super().limit(layer) if self.source == "gradient" else sides(layer)[1]

    @staticmethod
    def _exact(n: int, size: int) -> bool:
        return n <= EXACT or 2 * size >= n


@dataclass(eq=False)
class LeadingDirections(Measurement[SingularTriplets]):
    """The first ``rank`` singular triplets of the gradient outside a protected subspace, from sketches."""

    rank: int
    _: KW_ONLY
    protected: Mapping[str, ProtectedSubspace]
    generator: torch.Generator
    size: int
    per_sketch: Literal[1, 2] = 1

    def nbytes(self, layer: nn.Module, size: int) -> int:
        """Bytes of one layer's sketch."""
        m, n = sides(layer)
        if self.per_sketch == 2:
            return RangeSketch.bytes_for(m, n, size)
        return GradientSketch.bytes_for(m, n, size, own_probes=_is_small(layer))

    def shared_nbytes(self, layers: Iterable[nn.Module], size: int) -> int:
        """Bytes of the test matrices that layers share."""
        sharing = {sides(layer) for layer in layers if self.per_sketch == 2 or not _is_small(layer)}
        return _probe_bytes(sharing, size, per_sketch=self.per_sketch)

    def statistic(self, name: str, layer: nn.Module, size: int) -> Statistic:
        """A new sketch. Large layers share test matrices: own ones would quadruple the memory of a sketch."""
        subspace = self.protected.get(name)
        complement = None if subspace is None else subspace.basis.to(stored_weight(layer).device)
        if self.per_sketch == 1 and _is_small(layer):
            return _gradient_sketch(layer, size, self.generator, per_sketch=1, complement=complement)
        if self._probes is None:
            self._probes = Probes(draw_seed(self.generator))
        return _gradient_sketch(layer, size, self._probes, per_sketch=self.per_sketch, complement=complement)

    def result(self, statistic: Statistic) -> tuple[SingularTriplets, bool]:
        """The leading triplets; any size is sufficient."""
        assert isinstance(statistic, GradientSketch | RefinedSketch)
        left, sigma, right = statistic.triplets()
        return SingularTriplets(left[:, : self.rank], sigma[: self.rank], right[:, : self.rank]), True


def measure_importance(
    layers: Mapping[str, nn.Module], losses: Losses, *, source: DataSource, energy: float, passes: Passes | None = None
) -> Iterator[tuple[str, Importance]]:
    """Name and importance of each layer, one after the other: the input of `SubspaceMemory.extended`.

    Args:
        layers: linear layers by name, with or without adapters around them.
        losses: start a pass over the data (`task_losses`).
        source: ``"activation"``, ``"sensitivity"`` (inputs weighted by their squared loss gradient) or ``"gradient"``.
        energy: share of the energy that a sketch must hold; a smaller sketch is taken again at twice its size.
        passes: options; by default two passes for a gradient, since one would protect too much.
    """
    if source not in DATA_SOURCES:
        raise ValueError(f"source is {', '.join(DATA_SOURCES)}, got {source!r}")
    passes = passes or Passes()
    seed = draw_seed(torch.Generator().manual_seed(passes.seed))
    return measure_source(layers, losses, source, energy=energy, passes=passes, seed=seed)


def measure_input_moments(layers: Mapping[str, nn.Module], losses: Losses) -> dict[str, Tensor]:
    """Layer → the exact second moment ``Σ x xᵀ`` (n, n) of its inputs, from one pass; see `InputMoment`."""
    moments = {name: InputMoment(sides(layer)[1], device=stored_weight(layer).device) for name, layer in layers.items()}
    collect_statistics(layers, start_pass(losses), moments)
    return {name: cast(Tensor, moment.importance()) for name, moment in moments.items()}


def measure_source(
    layers: Mapping[str, nn.Module], losses: Losses, source: DataSource, *, energy: float, passes: Passes, seed: int
) -> Iterator[tuple[str, Importance]]:
    """`measure_importance` with test matrices by ``seed``."""
    per_sketch = passes.per_sketch or 2
    measurement = ImportanceMeasurement(source, energy=energy, seed=seed, size=passes.size, per_sketch=per_sketch)
    return run_passes(layers, losses, measurement, passes)


def leading_directions(
    layers: Mapping[str, nn.Module],
    losses: Losses,
    rank: int,
    protected: Mapping[str, ProtectedSubspace] | None = None,
    *,
    passes: Passes | None = None,
) -> dict[str, SingularTriplets]:
    """The leading ``rank`` singular triplets of each layer's gradient outside the protected subspace.

    Args:
        layers: linear layers by name, with or without adapters around them.
        losses: start a pass over the data (`task_losses`).
        rank: number of triplets; sketches have four times this size.
        protected: layer → subspace that the right directions avoid; None, or one per layer.
        passes: options; by default one pass.
    """
    validate_whole("rank", rank)
    passes = passes or Passes()
    if protected:
        validate_entries(protected, layers)
    measurement = LeadingDirections(
        rank,
        protected=protected or {},
        generator=torch.Generator().manual_seed(passes.seed),
        size=OVERSAMPLING * rank,
        per_sketch=passes.per_sketch or 1,
    )
    return dict(run_passes(layers, losses, measurement, passes))


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
    """The leading left and right directions of a task's gradient outside ``protected``: the start of its adapters.

    Args:
        model: frozen or not, in wrappers of PEFT or torch.compile or not; no weight gradient is computed.
        task: a task or its batches, as in `task_losses`.
        targets: linear layers, as in `target_linears`, by their names in the model without wrappers.
        rank: number of directions per layer.
        protected: a `SubspaceMemory`, or layer → subspace; None, or one per layer.
        examples: number of random training examples, at least one batch.
        batch_size: examples per batch.
        seed: of the examples, and of the test matrices unless ``passes`` is given.
        passes: options.

    Raises:
        ValueError: for a target without a match (the nearest names are listed), no data, layers without a gradient, or
            a memory that lacks some of the layers.
        TypeError: for batches that are no dictionaries of tensors.
    """
    losses = task_losses(model, task, examples=examples, batch_size=batch_size, seed=seed)
    return leading_directions(
        target_linears(model, targets), losses, rank, protected, passes=passes or Passes(seed=seed)
    )


def draw_seed(generator: torch.Generator) -> int:
    """A seed from the generator."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _gradient_sketch(
    layer: nn.Module,
    size: int,
    draw: torch.Generator | Probes,
    *,
    per_sketch: Literal[1, 2],
    complement: Tensor | None = None,
) -> Statistic:
    m, n = sides(layer)
    if per_sketch == 2:
        assert isinstance(draw, Probes)
        return RangeSketch(m, n, size=size, probes=draw, complement=complement, **_like(layer))
    return GradientSketch(m, n, size=size, generator=draw, complement=complement, **_like(layer))


def _probe_bytes(shapes: set[tuple[int, int]], size: int, *, per_sketch: Literal[1, 2]) -> int:
    """Bytes of the Gaussian matrices that gradient sketches of these shapes share."""
    wide = {(n, min(size, m, n)) for m, n in shapes}
    tall = {(m, min(size, m, n)) for m, n in shapes}
    if per_sketch == 2:
        return 4 * (sum(n * columns for n, columns in wide) + CHECKS * sum({m for m, _ in shapes}))
    return 4 * sum(rows * (3 * columns + 1 + CHECKS) for rows, columns in (*wide, *tall))


def _is_small(layer: nn.Module) -> bool:
    return max(sides(layer)) <= EXACT


def _like(layer: nn.Module) -> dict[str, Any]:
    weight = stored_weight(layer)
    return {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}
