"""The capacity of a layer: the policy for a full one, and the result of a growth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from manifold_cl.kinds import is_number
from manifold_cl.lists import listed

Policy = Literal["stop", "evict", "raise"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class CapacityError(ValueError):
    """A layer lacks room for its protected directions; the message names it. The memory is unchanged."""


@dataclass(frozen=True)
class LayerGrowth:
    """The growth of one layer's subspace by one task.

    Args:
        task: name of the task.
        n: inputs of the layer.
        k: protected directions after the growth.
        rank: directions kept free for an adapter.
        threshold: requested share of the task's energy.
        added: added columns.
        dropped: columns, old or new, that were left out for lack of room.
        before: share of the task's energy along the old columns.
        explained: share along the columns after the growth.
        captured: share that the statistic holds: 1 for an exact one, less for a sketch.
        pace: mean number of columns added per task; pre-trained weights are not a task.
    """

    task: str
    n: int
    k: int
    rank: int
    threshold: float
    added: int
    dropped: int
    before: float
    explained: float
    captured: float
    pace: float

    @property
    def capacity_left(self) -> int:
        """Directions that may still be protected: n − k − rank, at least 0."""
        return max(self.n - self.k - self.rank, 0)

    @property
    def tasks_left(self) -> float:
        """Forecast of tasks until the layer is full: capacity left over the pace, infinite at pace 0."""
        if not self.capacity_left:
            return 0.0
        return self.capacity_left / self.pace if self.pace else math.inf

    @property
    def full(self) -> bool:
        """Whether something was left out for lack of room."""
        return self.dropped > 0

    def after(self, earlier: LayerGrowth | None) -> LayerGrowth:
        """This growth and an ``earlier`` one of the same task in one: each source of a union grows by itself."""
        if earlier is None or earlier.task != self.task:
            return self
        sums = {name: getattr(self, name) + getattr(earlier, name) for name in ("added", "dropped")}
        least = {name: min(getattr(self, name), getattr(earlier, name)) for name in ("before", "explained", "captured")}
        return replace(self, **sums, **least)

    def to_dict(self) -> dict[str, Any]:
        """The fields, the capacity left and the forecast, for JSON: null for infinity."""
        left = self.tasks_left
        return {**asdict(self), "capacity_left": self.capacity_left, "tasks_left": left if left < math.inf else None}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LayerGrowth:
        """The result that `to_dict` wrote; TypeError for a word in the place of a number."""
        values = {name: content[name] for name in cls.__dataclass_fields__}
        if words := [name for name, value in values.items() if name != "task" and not is_number(value)]:
            raise TypeError(f"{words[0]} is {values[words[0]]!r}, a number is needed")
        return cls(**values)


def kept_columns(energies: Tensor, room: int, policy: Policy, *, layer: str) -> Tensor:
    """Indices, ascending, of the columns that stay when only ``room`` fit: the oldest, or those with most energy.

    Raises:
        CapacityError: by policy ``"raise"``; by ``"evict"`` where energies are unknown.
    """
    if policy == "raise":
        raise CapacityError(
            f"{layer} has room for {room} protected directions, not for {len(energies)}: lower the energy "
            "threshold or the rank, or choose the policy stop or evict"
        )
    if policy == "stop":
        return torch.arange(room, device=energies.device)
    if bool(energies.isnan().any()):
        raise CapacityError(
            f"the energies of the columns of {layer} are unknown, since its memory is of an early version: choose the "
            "policy stop"
        )
    return energies.argsort(descending=True, stable=True)[:room].sort().values


def validate_entries(protected: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Raise ValueError for protected subspaces that lack some of the layers: their adapters would be free."""
    if lacking := [name for name in layers if name not in protected]:
        shown = listed(lacking)
        raise ValueError(
            f"the memory has no entry for {len(lacking)} layers, which would be free: {shown}. Grow it over all layers "
            "that train, or give these an empty subspace, ProtectedSubspace.empty(n)"
        )
