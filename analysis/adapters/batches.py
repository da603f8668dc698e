"""Batches of equally shaped layers, decomposed within a memory budget."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.names import matched_names
from analysis.numerics.decomposition import Decomposition, Triples, decompose, decompose_aligned

MEMORY_BUDGET = 2**31
"""Bytes that a batch may take, 2 GiB, whatever the number of layers."""
BYTES_PER_NUMBER = 48
"""Bytes per number of the factors at peak memory, as measured: float64, and copies for QR."""

CPU_BATCH = 2**28
"""Bytes of a batch on a CPU, where larger ones only miss the caches: 256 MiB are read and decomposed a third faster."""

Progress = Callable[[int, int], None]
"""Called with the number of finished layers and the number of all layers."""


@dataclass(frozen=True, eq=False)
class LayerBatch:
    """Layers of one shape (m, n), with the updates of all tasks decomposed."""

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    m: int
    n: int
    decomposition: Decomposition
    rights: Tensor  # (L, n, R), the right factors of all tasks side by side

    @property
    def updates(self) -> tuple[Triples, ...]:
        """The singular triples of each task's update."""
        return self.decomposition.updates

    def input_rows(self, task: int, index: int) -> Tensor:
        """``diag(σ) Vᵀ`` (r, n) of one update of one layer, in the layer's inputs."""
        columns = self.decomposition.columns[task]
        core = self.updates[task].left[index].mT @ self.decomposition.left[index][:, columns]
        return core @ self.rights[index][:, columns].mT


def layer_batches(
    adapters: AdapterSet,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Iterator[LayerBatch]:
    """All layers, decomposed once, in batches whose factors have equal shapes task by task.

    A batch takes at most `memory_budget` bytes in all tasks. A single layer is taken even where it needs more.
    """
    _validate_adapters(adapters)
    budget = min(memory_budget, CPU_BATCH) if torch.device(device).type == "cpu" else memory_budget
    limit = max(1, budget // BYTES_PER_NUMBER)
    groups: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
    shapes = [source.shapes for source in adapters.sources]
    for layer in adapters.layers:
        groups.setdefault(tuple(by_layer[layer] for by_layer in shapes), []).append(layer)
    done, total = 0, len(adapters.layers)
    for shape, layers in groups.items():
        size = max(1, limit // max(1, sum((m + n) * r for m, n, r in shape)))
        m, n, _ = shape[0]
        ranks = [r for _, _, r in shape]
        for start in range(0, len(layers), size):
            batch = tuple(layers[start : start + size])
            lefts, rights = _stacked_factors(adapters, batch, (m, n), ranks, device=device, dtype=dtype)
            aligned = len(ranks) == 1 and adapters.sources[0].descending.issuperset(batch)
            decomposition = decompose_aligned(lefts) if aligned else decompose(lefts, rights, ranks)
            yield LayerBatch(adapters.tasks, batch, m, n, decomposition, rights)
            done += len(batch)
            if progress is not None:
                progress(done, total)


def _stacked_factors(
    adapters: AdapterSet,
    layers: Sequence[str],
    shape: tuple[int, int],
    ranks: Sequence[int],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Left (L, m, R) and right (L, n, R) factors of all tasks side by side, on the device, column by column."""
    # QR copies its argument to columns first: written that way, the copy is a straight one
    lefts, rights = (torch.empty(len(layers), sum(ranks), size, device=device, dtype=dtype).mT for size in shape)
    end = 0
    for task, rank in zip(adapters.tasks, ranks, strict=True):
        start, end = end, end + rank
        updates = list(adapters.read(task, layers))
        lefts[..., start:end] = torch.stack([update.left for update in updates]).to(device)
        rights[..., start:end] = torch.stack([update.right for update in updates]).to(device)
    return lefts, rights


BasisOf = Callable[[str, str], Tensor | None]
"""Task and layer to the basis (n, k) that was protected while the task was learned."""


def _validate_adapters(adapters: object) -> None:
    """Refuse anything but a set of adapters; a path is named with the call that loads it."""
    if not isinstance(adapters, AdapterSet):
        path = f"{str(adapters)!r}" if isinstance(adapters, str | Path) else "PATH, ..."
        raise TypeError(f"adapters is an AdapterSet, got {type(adapters).__name__}: give AdapterSet.load({path})")


def protected_bases(adapters: AdapterSet, protected: Mapping[str, Tensor] | None) -> BasisOf:
    """The bases of `protected` for every task, by the adapters' names of their layers; else those that a run holds.

    Names may be those of another version of transformers.

    Raises:
        ValueError: no protected layer is an adapted one: they are another model's.
    """
    _validate_adapters(adapters)
    if protected is None:
        return adapters.protected
    names = matched_names(adapters.layers, protected)
    if not names:
        raise ValueError(
            f"none of the {len(protected)} protected layers is adapted: they are called like "
            f"{next(iter(protected), 'nothing')}, the adapters' like {adapters.layers[0]}"
        )
    bases = {layer: protected[name] for layer, name in names.items()}
    return lambda task, layer: bases.get(layer)


class ProtectedEnergy(NamedTuple):
    """The energy ``σ_i² ‖Fᵀ v_i‖²`` (r,) of one update on a protected subspace of k directions."""

    task: int
    layer: int
    k: int
    components: Tensor


def protected_energies(batch: LayerBatch, basis_of: BasisOf) -> list[ProtectedEnergy]:
    """The energy on protected directions of every update of a batch, where a basis exists.

    Raises:
        ValueError: a basis does not have the layer's number of inputs.
    """
    energies = []
    for (task, name), (index, layer) in product(enumerate(batch.tasks), enumerate(batch.layers)):
        if (basis := basis_of(name, layer)) is None:
            continue
        if basis.ndim != 2 or basis.shape[0] != batch.n:
            shape = tuple(basis.shape)
            raise ValueError(f"{layer}: the protected basis has shape {shape}, ({batch.n}, k) was expected")
        onto = batch.input_rows(task, index) @ basis.to(batch.rights)
        energies.append(ProtectedEnergy(task, index, basis.shape[1], onto.square().sum(-1)))
    return energies
