"""Growth of a memory by data and by pre-trained weights, at the present model or an earlier one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import validate_plain_weight
from manifold_cl.adapters.layers import named_linears, require_layers, stored_weight
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual.losses import Losses
from manifold_cl.continual.subspaces.capacity import Policy
from manifold_cl.continual.subspaces.directions import DATA_SOURCES, DataSource, draw_seed, measure_source
from manifold_cl.continual.subspaces.layer_columns import PRETRAINING
from manifold_cl.continual.subspaces.memory import SubspaceMemory
from manifold_cl.continual.subspaces.passes import Passes
from manifold_cl.continual.subspaces.statistic import Directions
from manifold_cl.geometry.subspace import ThresholdRule
from manifold_cl.linalg import full_precision
from manifold_cl.rules import validate_kind

WEIGHT_ENERGY = 0.6
"""Share of a pre-trained weight's energy that KeepLoRA protects (luo2026keeplora)."""


def parse_sources(text: str) -> tuple[DataSource, ...]:
    """The sources in ``text``; several for a union, such as ``"activation+gradient"``.

    Raises:
        TypeError: for anything but text.
        ValueError: for an unknown source, or one that comes twice.
    """
    if not isinstance(text, str):
        raise TypeError(f"source is text, got {text!r}")
    names = tuple(part.strip() for part in text.split("+"))
    if any(name not in DATA_SOURCES for name in names):
        raise ValueError(f"source is {', '.join(DATA_SOURCES)}, or several joined by +, got {text!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"a source is named once, got {text!r}")
    return tuple(source for source in DATA_SOURCES if source in names)


def grow_memory(
    memory: SubspaceMemory,
    layers: Mapping[str, nn.Module],
    losses: Losses,
    *,
    energy: float,
    rank: int,
    source: str = "sensitivity",
    policy: Policy = "stop",
    threshold_rule: ThresholdRule = "inclusive",
    task: str = "",
    passes: Passes | None = None,
) -> SubspaceMemory:
    """A memory that also holds the protected directions of a task, source by source.

    >>> layers = {"layer": nn.Linear(8, 4)}
    >>> x = torch.eye(8)[:2]  # a task that uses two input directions
    >>> losses = lambda: [lambda: layers["layer"](x).square().sum()]
    >>> memory = grow_memory(SubspaceMemory.empty(layers), layers, losses, energy=1.0, rank=2)
    >>> memory["layer"].k
    2

    Args:
        memory: the directions that are protected so far.
        layers: linear layers by name, with or without adapters around them, all of them in the memory.
        losses: start a pass over the data (`task_losses`).
        energy: share of each source's energy to hold.
        rank: directions to keep free.
        source: ``"sensitivity"``, ``"activation"``, ``"gradient"``, or a union such as ``"activation+gradient"``.
        policy: for full layers (`SubspaceMemory.extended`).
        threshold_rule: for the column that crosses the threshold (`ThresholdRule`).
        task: its name.
        passes: options of the passes over the data.

    Raises:
        TypeError: for a memory, layers or losses of another kind, with what to give.
    """
    _validate_memory(memory)
    task = task or f"task {len(memory.tasks) + 1}"
    passes = passes or Passes()
    draw = torch.Generator().manual_seed(passes.seed)
    for one in parse_sources(source):
        importances = measure_source(layers, losses, one, energy=energy, passes=passes, seed=draw_seed(draw))
        memory = memory.extended(
            importances, energy=energy, rank=rank, policy=policy, threshold_rule=threshold_rule, task=task
        )
    return memory


def _validate_memory(memory: SubspaceMemory) -> None:
    remedy = "begin with SubspaceMemory.empty(layers), and keep what grow_memory returns"
    validate_kind("memory", memory, SubspaceMemory, remedy=remedy)


def grow_memory_from_weights(
    memory: SubspaceMemory,
    layers: Mapping[str, nn.Module],
    *,
    rank: int,
    energy: float = WEIGHT_ENERGY,
    policy: Policy = "stop",
) -> SubspaceMemory:
    """A memory that also holds the leading right singular directions of the layers' own weights: "task 0".

    Exclusive of the column that crosses the threshold, as in luo2026keeplora.

    Raises:
        ValueError: for a weight with NaN or infinite entries.
        TypeError: for a quantised weight, whose codes have other singular directions.
    """
    _validate_memory(memory)
    linears = require_layers(layers)
    for name, layer in linears.items():
        validate_plain_weight(layer, to="take singular vectors of", name=name)
    importances = ((name, weight_directions(stored_weight(layer), name)) for name, layer in linears.items())
    return memory.extended(
        importances, energy=energy, rank=rank, policy=policy, threshold_rule="exclusive", task=PRETRAINING
    )


@torch.no_grad()
def weight_directions(weight: Tensor, layer: str) -> Directions:
    """The right singular directions of ``weight`` (m, n) times its singular values, by the smaller Gram matrix.

    O(mn · min(m, n)). Energies below 1e-7 of the largest are rounding errors of float32. A weight that is sharded over
    ranks is gathered, so every rank must call this. ValueError, with the name of the layer, for a weight that is NaN or
    infinite.
    """
    if type(weight) is not Tensor and hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    with full_precision(weight.device):
        wide = weight.detach().to(torch.float64)
        m, n = wide.shape
        total = float(wide.square().sum())
        if not math.isfinite(total):
            raise ValueError(f"the weight of {layer} has NaN or infinite entries: use an intact checkpoint")
        if n <= m:
            energies, vectors = torch.linalg.eigh(wide.mT @ wide)
            columns = vectors * energies.clamp_min(0).sqrt()
        else:  # Wᵀu, for the left singular directions u, are the right ones times their singular values
            _, left = torch.linalg.eigh(wide @ wide.mT)
            columns = wide.mT @ left
    return Directions(columns.flip(-1), total)


@contextmanager
def without_updates(model: nn.Module, updates: Sequence[Mapping[str, Factors]]) -> Iterator[None]:
    """A context in which the model computes as before these merged updates: as pre-trained, where they are all updates.

    A hook adds ``−ΔW x`` to each layer's output, from the factors; no weight is copied or changed.

    Raises:
        ValueError: for an update of a layer that the model lacks.
    """
    modules = named_linears(model)
    with ExitStack() as hooks:
        for update in updates:
            for name, factors in update.items():
                if name not in modules:
                    raise ValueError(f"an update names {name!r}, which is no linear layer of this model")
                hooks.enter_context(modules[name].register_forward_hook(partial(_undo, factors)))
        yield


def _undo(factors: Factors, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    x = inputs[0]
    right, left = factors.right.to(x), factors.weighted_left().to(x)
    corrected: Tensor = output - ((x @ right) @ left.mT).to(output.dtype)
    return corrected
