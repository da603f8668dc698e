"""Growth of one layer's protected columns by the energy rule, and the history of each column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_cl.continual.subspaces.capacity import LayerGrowth, Policy, kept_columns
from manifold_cl.continual.subspaces.statistic import Directions, Importance, Tokens
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.geometry.subspace import ThresholdRule
from manifold_cl.kinds import is_number, is_whole

PRETRAINING = "pre-training"
"""The name in ``tasks`` of the pre-trained weights, "task 0"."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The history of a layer's protected columns, in their order.

    Args:
        energies: (k,) float64, on the CPU: share of a task's energy along the column, summed over tasks; NaN if
            unknown.
        origins: (k,) int64: index, in the memory's tasks, of the task that added the column; −1 if unknown.
    """

    energies: Tensor
    origins: Tensor

    @classmethod
    def unknown(cls, k: int) -> Columns:
        """The history of ``k`` columns that came without one."""
        return cls(torch.full((k,), torch.nan, dtype=torch.float64), torch.full((k,), -1))

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON: null for NaN."""
        energies = [None if math.isnan(e) else e for e in self.energies.tolist()]
        return {"energies": energies, "tasks": self.origins.tolist()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, tasks: int, k: int) -> Columns:
        """The history that `to_dict` wrote; ValueError unless it is of ``k`` columns and of ``tasks`` tasks."""
        energies, origins = content["energies"], content["tasks"]
        if any(not is_whole(origin) or not -1 <= origin < tasks for origin in origins):
            raise ValueError(f"columns come from tasks that are not among the {tasks} of the memory")
        if not len(energies) == len(origins) == k or not all(e is None or is_number(e) for e in energies):
            raise ValueError(f"{len(origins)} tasks and {len(energies)} energies describe {k} columns")
        numbers = [torch.nan if e is None else e for e in energies]
        return cls(torch.tensor(numbers, dtype=torch.float64), torch.tensor(origins, dtype=torch.int64))


@dataclass(frozen=True)
class GrowthOptions:
    """Options of a growth, the same for all layers: as in `SubspaceMemory.extended`, and the tasks with this one."""

    task: str
    tasks: tuple[str, ...]
    energy: float
    rank: int
    policy: Policy
    threshold_rule: ThresholdRule
    compact: bool = False


@dataclass(frozen=True, eq=False)
class GrownLayer:
    """A layer's subspace after a growth, the history of its columns, and the result of this growth alone."""

    subspace: ProtectedSubspace
    columns: Columns
    result: LayerGrowth


def grow_layer(
    name: str, old: ProtectedSubspace, before: Columns, importance: Importance, options: GrowthOptions
) -> GrownLayer:
    """The subspace of layer ``name`` that also holds the share ``options.energy`` of the importance.

    Raises:
        CapacityError: by policy.
        ValueError: for a rank beyond the number of inputs.
    """
    rank, index = options.rank, len(options.tasks) - 1
    if old.n < rank:
        raise ValueError(f"{name} has {old.n} inputs, too few for rank {rank}: lower the rank")
    new = _grow(old, importance, energy=options.energy, threshold_rule=options.threshold_rule)
    if options.compact:
        new = _compacted(name, new, old)
    shares = _shares(new, importance)
    after = Columns(
        torch.cat([before.energies, shares.new_zeros(new.k - old.k)]) + shares,
        torch.cat([before.origins, torch.full((new.k - old.k,), index)]),
    )
    held, wanted, room = float(shares[: old.k].sum()), new.k, new.n - rank
    if wanted > room:
        stay = kept_columns(after.energies, room, options.policy, layer=name)
        stay_here = stay.to(new.basis.device)
        if new.packed is not None:
            new = ProtectedSubspace.from_packed(new.packed[stay_here], new.n)
        else:
            new = ProtectedSubspace(new.basis[:, stay_here].contiguous())
        after, shares = Columns(after.energies[stay], after.origins[stay]), shares[stay]
    result = LayerGrowth(
        task=options.task,
        n=new.n,
        k=new.k,
        rank=rank,
        threshold=options.energy,
        added=int((after.origins == index).sum()) - int((before.origins == index).sum()),
        dropped=wanted - new.k,
        before=held,
        explained=float(shares.sum()),
        captured=importance.captured if isinstance(importance, Directions) else 1.0,
        pace=_pace(after.origins, options.tasks),
    )
    return GrownLayer(new, after, result)


def _grow(
    old: ProtectedSubspace, importance: Importance, *, energy: float, threshold_rule: ThresholdRule
) -> ProtectedSubspace:
    if isinstance(importance, Tensor):
        return old.extended_to_moment(importance, energy=energy, threshold_rule=threshold_rule)
    if isinstance(importance, Tokens):
        return old.extended_to_few(importance.columns, energy=energy, threshold_rule=threshold_rule)
    return old.extended(importance.columns, energy=energy, total=importance.total, threshold_rule=threshold_rule)


def _compacted(name: str, new: ProtectedSubspace, old: ProtectedSubspace) -> ProtectedSubspace:
    if new is old:
        return old
    if old.k and old.packed is None:
        raise ValueError(
            f"the memory is compact, but holds {old.k} columns of {name} in float32, which cannot be rounded once "
            "frames are orthogonal to them: begin with SubspaceMemory.empty(layers, compact=True)"
        )
    return new.compacted(old)


def _shares(subspace: ProtectedSubspace, importance: Importance) -> Tensor:
    """Share of the energy along each protected column (k,), float64 on the CPU."""
    if isinstance(importance, Tensor):
        basis = subspace.basis.to(importance.dtype)
        along, total = ((importance @ basis) * basis).sum(0), float(importance.diagonal().double().sum())
    else:
        basis = subspace.basis.to(importance.columns.dtype)
        along, total = (importance.columns.mT @ basis).square().sum(0), importance.total
    return along.double().clamp_min(0).cpu() / total if total > 0 else torch.zeros(subspace.k, dtype=torch.float64)


def _pace(origins: Tensor, tasks: tuple[str, ...]) -> float:
    learned = [i for i, name in enumerate(tasks) if name != PRETRAINING]
    count = int(torch.isin(origins, torch.tensor(learned, dtype=origins.dtype)).sum())
    return count / len(learned) if learned else 0.0
