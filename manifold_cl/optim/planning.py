"""What steps together, worked out once and kept until parameters, gradients, complements or states change."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.optim.adam import MatrixAdam
from manifold_cl.optim.banks import ELEMENTWISE, Bank, State, state_key
from manifold_cl.optim.buckets import Bucket, Member, bucketed
from manifold_cl.optim.layout import RowSharded
from manifold_cl.optim.options import Group
from manifold_cl.optim.polar import PolarBucket
from manifold_cl.optim.sharing import Owners


class Plan:
    """Buckets of the points that have a gradient, and the Euclidean parameters that have one, by group."""

    def __init__(self) -> None:
        self.points: list[tuple[Group, Bucket]] = []
        self.rest: list[tuple[Group, list[Tensor]]] = []
        self._groups: list[Group] = []
        self._signature: tuple[int, ...] = ()

    def updated(
        self,
        groups: Sequence[Group],
        manifolds: MutableMapping[Tensor, Any],
        state: MutableMapping[Tensor, State],
        base: type[Optimizer],
        owners: Owners | None,
    ) -> Plan:
        """This plan, brought up to date; buckets that still fit are used again."""
        active = [[p for p in group["params"] if p.grad is not None] for group in groups]
        signature = (*map(id, groups), *(id(p) for params in active for p in params))
        if signature == self._signature and all(_fits(bucket, state) for _, bucket in self.points):
            return self
        known = {_key(bucket.members, bucket.parts): bucket for _, bucket in self.points if _fits(bucket, state)}
        banked = elementwise(base)
        self.points, self.rest = [], []
        self._groups, self._signature = list(groups), signature  # the groups are held, so their ids stay theirs
        for group, params in zip(groups, active, strict=True):
            members = [Member(p, manifolds[p]) for p in params if p in manifolds]
            for slab in bucketed(members, state_key=lambda p: state_key(state.get(p)) if banked else None):
                parts = None if owners is None else owners.parts(len(slab), len(self.points))
                bucket = known.get(_key(slab, parts)) or _made(slab, parts, owners, state, base)
                self.points.append((group, bucket))
            if rest := [p for p in params if p not in manifolds]:
                self.rest.append((group, rest))
        return self


def elementwise(base: type[Optimizer]) -> bool:
    """Whether B parameters may step as one: torch's element-wise optimizers and `MatrixAdam`."""
    return base is MatrixAdam or (base.__name__ in ELEMENTWISE and base.__module__.startswith("torch.optim."))


def _made(
    slab: Sequence[Member],
    parts: list[slice] | None,
    owners: Owners | None,
    state: MutableMapping[Tensor, State],
    base: type[Optimizer],
) -> Bucket:
    kind = PolarBucket if PolarBucket.fits(slab[0]) else Bucket
    bucket = kind(slab, parts=parts, rank=0 if owners is None else owners.rank)
    if isinstance(bucket.layout, RowSharded) and (base is MatrixAdam or not elementwise(base)):
        raise ValueError(
            f"{base.__name__} takes statistics over whole matrices, and rows of a point of shape "
            f"{tuple(slab[0].parameter.shape)} are spread over ranks: use an element-wise optimizer, or keep the "
            "adapters out of fully_shard (ignored_params)"
        )
    if elementwise(base):
        bucket.bank = Bank([state.get(p) or {} for p in bucket.parameters], bucket.layout, bucket.parameters)
    return bucket


def _fits(bucket: Bucket, state: MutableMapping[Tensor, State]) -> bool:
    return (bucket.bank is None or bucket.bank.still_holds(state)) and bucket.is_current()


def _key(members: Sequence[Member], parts: list[slice] | None) -> tuple[object, ...]:
    ends = () if parts is None else tuple((part.start, part.stop) for part in parts)
    return (*(id(member.parameter) for member in members), *ends)
