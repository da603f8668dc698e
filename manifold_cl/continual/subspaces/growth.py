"""Sources of protection beside the data at the present model: earlier models, pre-trained weights, unions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.layers import named_linears, require_linear, stored_weight
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual.losses import Losses
from manifold_cl.continual.subspaces.capacity import Policy
from manifold_cl.continual.subspaces.directions import DATA_SOURCES, START, DataSource, measure_importance
from manifold_cl.continual.subspaces.memory import PRETRAINING, SubspaceMemory
from manifold_cl.continual.subspaces.passes import Passes
from manifold_cl.continual.subspaces.statistic import Directions
from manifold_cl.geometry.subspace import ThresholdRule
from manifold_cl.linalg import full_precision

WEIGHT_ENERGY = 0.6
"""Share of a pre-trained weight's energy that KeepLoRA protects (method.md 2.4)."""


def parse_sources(text: str) -> tuple[DataSource, ...]:
    """The sources that ``text`` names, joined by ``+`` for their union.

    Raises:
        ValueError: for an unknown one, or one that is named twice.
    """
    if not isinstance(text, str):
        raise TypeError(f"source is text, got {text!r}")
    names = tuple(part.strip() for part in text.split("+"))
    unknown = [name for name in names if name not in DATA_SOURCES]
    if unknown or len(set(names)) < len(names):
        raise ValueError(
            f"source is {', '.join(DATA_SOURCES)}, or several joined by +, got {text!r}"
            if unknown
            else f"a source is named once, got {text!r}"
        )
    return tuple(source for source in DATA_SOURCES if source in names)


def grow_memory(
    memory: SubspaceMemory,
    layers: Mapping[str, nn.Module],
    losses: Losses,
    *,
    energy: float,
    rank: int,
    generator: torch.Generator,
    source: str = "sensitivity",
    policy: Policy = "stop",
    threshold_rule: ThresholdRule = "inclusive",
    task: str = "",
    size: int = START,
    passes: Passes | None = None,
) -> SubspaceMemory:
    """``memory``, grown by what the data rely on in each layer, source by source.

    Args:
        memory: what is protected so far.
        layers: linear layers by name, with or without adapters around them, all of them in the memory.
        losses: starts a pass over the data.
        energy: share of each source's energy to hold.
        rank: directions to keep free.
        generator: of test matrices.
        source: ``"sensitivity"``, ``"activation"``, ``"gradient"``, or a union such as ``"activation+gradient"``.
        policy: for full layers (`SubspaceMemory.extended`).
        threshold_rule: what becomes of the column that crosses the threshold (`ThresholdRule`).
        task: its name.
        size: of sketches at the start.
        passes: how the data are read; see `measure_importance`.
    """
    task = task or f"task {len(memory.tasks) + 1}"
    for one in parse_sources(source):
        found = measure_importance(
            layers, losses, source=one, energy=energy, generator=generator, passes=passes, size=size
        )
        memory = memory.extended(
            found, energy=energy, rank=rank, policy=policy, threshold_rule=threshold_rule, task=task
        )
    return memory


def grow_memory_from_weights(
    memory: SubspaceMemory,
    layers: Mapping[str, nn.Module],
    *,
    rank: int,
    energy: float = WEIGHT_ENERGY,
    policy: Policy = "stop",
) -> SubspaceMemory:
    """``memory``, grown by the leading right singular directions of the layers' own weights: "task 0".

    The column that crosses the threshold is dropped, as KeepLoRA does (method.md 2.4).
    """
    found = ((name, weight_directions(stored_weight(require_linear(name, layer)))) for name, layer in layers.items())
    return memory.extended(found, energy=energy, rank=rank, policy=policy, threshold_rule="exclusive", task=PRETRAINING)


@torch.no_grad()
def weight_directions(weight: Tensor) -> Directions:
    """The right singular directions of ``weight`` (m, n) times its singular values, by the smaller Gram matrix.

    O(mn · min(m, n)). Energies below 1e-7 of the largest are rounding of float32 and come out as what they are.
    """
    with full_precision(weight.device):
        wide = weight.detach().to(torch.float64)
        m, n = wide.shape
        if n <= m:
            energies, vectors = torch.linalg.eigh(wide.mT @ wide)
            columns = vectors * energies.clamp_min(0).sqrt()
        else:  # Wᵀu, for the left singular directions u, are the right ones times their singular values
            _, left = torch.linalg.eigh(wide @ wide.mT)
            columns = wide.mT @ left
    return Directions(columns.flip(-1), float(wide.square().sum()))


@contextmanager
def without_updates(model: nn.Module, updates: Sequence[Mapping[str, Factors]]) -> Iterator[None]:
    """Inside, the model answers as before these merged updates: the pre-trained model, when they are all of them.

    Each layer's output is corrected by ``−ΔW x`` from the factors; no weight is copied or changed.

    Raises:
        ValueError: for an update of a layer that the model lacks.
    """
    modules = named_linears(model)

    def undo(factors: Factors) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def on_forward(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            right, left = factors.right.to(x), factors.weighted_left().to(x)
            corrected: Tensor = output - ((x @ right) @ left.mT).to(output.dtype)
            return corrected

        return on_forward

    handles = []
    try:
        for update in updates:
            for name, factors in update.items():
                if name not in modules:
                    raise ValueError(f"an update names {name!r}, which is no linear layer of this model")
                handles.append(modules[name].register_forward_hook(undo(factors)))
        yield
    finally:
        for handle in handles:
            handle.remove()
