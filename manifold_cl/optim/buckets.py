"""Parameters that step together: equal in shape, dtype, device and kind of manifold, as one batched tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.subspace import stack_bases

CLASSES = 16
"""Size classes of complements: widths within the same sixteenth of n are padded to one, at most 6 % of n too wide."""


class Member(NamedTuple):
    """A parameter and the manifold it lives on (any geoopt manifold)."""

    parameter: Tensor
    manifold: Any


class Bucket:
    """B parameters of one shape on one *batched* manifold.

    Restricted Stiefel manifolds batch by stacking their complements, padded by zero columns up to the widest of
    the same size class, so that one nearly full layer does not widen all others. Any other geoopt manifold is
    a bucket of its own.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.parameters = [member.parameter for member in members]
        self.manifold = members[0].manifold if not _batches(members[0]) else _batched(members)
        self._stamp = _stamp(members)

    def stacked(self) -> Tensor:
        """A copy of the parameters, (B, …)."""
        return torch.stack([p.detach() for p in self.parameters])

    def stacked_grads(self) -> Tensor:
        """A copy of the gradients, (B, …)."""
        return torch.stack([p.grad for p in self.parameters if p.grad is not None])

    def moved(self, x: Tensor, displacement: Tensor) -> Tensor:
        """The points reached from x (B, …) by the tangent part of ``displacement``."""
        if not isinstance(self.manifold, RestrictedStiefel):  # ours takes the tangent part itself, with one projection
            displacement = self.manifold.proju(x, displacement)
        return cast(Tensor, self.manifold.retr(x, displacement))

    def write(self, x: Tensor) -> None:
        """Set the parameters to the slices of x (B, …)."""
        torch._foreach_copy_([p.detach() for p in self.parameters], list(x.unbind(0)))

    def is_current(self, members: Sequence[Member]) -> bool:
        """Whether this bucket was made of these members and of the complements they have now."""
        return self._stamp == _stamp(members)


def bucketed(members: Iterable[Member]) -> list[list[Member]]:
    """The members, grouped by what lets them batch; order is kept inside a group."""
    groups: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        p, manifold = member
        if _batches(member):
            size_class = -(-manifold.width * CLASSES // p.shape[-2])
            rules = (manifold.retraction, manifold.metric, manifold.transport)
            key: tuple[object, ...] = (p.shape, p.dtype, p.device, *rules, size_class)
        else:
            key = (id(p),)
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def _batches(member: Member) -> bool:
    return isinstance(member.manifold, RestrictedStiefel)


def _batched(members: Sequence[Member]) -> RestrictedStiefel:
    first = members[0].parameter
    manifolds = [member.manifold for member in members]
    if first.ndim == 2 or all(manifold.complement is None for manifold in manifolds):
        return RestrictedStiefel.stack(manifolds)
    # A parameter that is a batch itself brings a basis for each of its points, or one for all of them.
    batch = first.shape[:-2]
    bases = [manifold.complement.expand(*batch, -1, -1).flatten(0, -3).unbind(0) for manifold in manifolds]
    complement = stack_bases([basis for own in bases for basis in own], first.shape[-2], like=first.detach())
    shared = manifolds[0]
    return RestrictedStiefel(
        complement.reshape(len(members), *batch, *complement.shape[-2:]),
        retraction=shared.retraction,
        metric=shared.metric,
        transport=shared.transport,
    )


def _stamp(members: Sequence[Member]) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever a parameter, or the content of its complement, does."""
    bases = (getattr(member.manifold, "complement", None) for member in members)
    return tuple(
        (id(member.parameter), 0 if basis is None else id(basis), 0 if basis is None else basis._version)
        for member, basis in zip(members, bases, strict=True)
    )
