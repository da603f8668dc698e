"""Points that step together: equal in shape, dtype, device and kind of manifold, as one batched tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.subspace import stack_bases
from manifold_cl.optim.banks import Bank
from manifold_cl.optim.layout import Whole, is_dtensor, layout_of

CLASSES = 16
"""Size classes of complements: widths within the same sixteenth of n are padded to one, at most 6 % of n too wide."""
SLAB = {"cpu": 1 << 20}
"""Bytes of points that step at once: on a CPU what its cache holds beside moments and gradient (bench_step.py)."""
SLAB_ELSEWHERE = 1 << 26
"""On an accelerator few launches matter more than cache; the bound is for memory."""


class Member(NamedTuple):
    """A parameter and the manifold it lives on (any geoopt manifold)."""

    parameter: Tensor
    manifold: Any


class Workspace:
    """Scratch memory of a step, one buffer a slot, as large as the largest bucket needs, allocated once."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, slot: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of this shape, dtype and device as ``like``, content arbitrary; the next call reuses its memory."""
        key, size = (slot, like.device, like.dtype), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size].view(*shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class Bucket:
    """B points on one batched manifold, with the verbs of a step; any geoopt manifold.

    ``part`` is the slice of members whose geometry is worked out on this rank: all of them, unless ``parts`` deals
    them out. The slabs x, g, d, y below are of those members alone. ``bank`` holds the base optimizer's state where
    that can be one tensor.
    """

    bank: Bank | None = None
    refuses_nan = True
    """Whether `move_` may raise where a displacement is not finite, as decompositions do."""

    def __init__(self, members: Sequence[Member], *, parts: list[slice] | None = None, rank: int = 0) -> None:
        self.members = list(members)
        self.parts = parts
        self.part = slice(0, len(self.members)) if parts is None else parts[rank]
        self.layout = layout_of(self.members[0].parameter)
        self.parameters = [member.parameter for member in self.members]
        self.locals = [self.layout.local(p.detach()) for p in self.parameters]
        self.stamp = stamp(self.members)
        self.prepare([self.members[i] for i in range(len(self.members))[self.part]])

    def prepare(self, own: Sequence[Member]) -> None:
        """Set up what depends on the manifolds of the members in ``part``."""
        if not isinstance(self.layout, Whole):
            manifold = self.members[0].manifold
            retraction = getattr(getattr(manifold, "retraction", None), "name", type(manifold).__name__)
            raise ValueError(
                f"points sharded by rows retract by 'polar' with the projection transport, which need only p × p sums; "
                f"got {retraction!r}: use those, or keep the adapters out of fully_shard (ignored_params)"
            )
        self.manifold = None if not own else own[0].manifold if not batches(own[0]) else _batched(own)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, …), of what is stored on this rank."""
        return (len(self.members), *self.locals[0].shape)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """`shape`, of the members in ``part``."""
        return (self.part.stop - self.part.start, *self.locals[0].shape)

    def gather_own(self, into: Tensor) -> None:
        """Copy the parameters of ``part``."""
        torch._foreach_copy_(list(into.unbind(0)), self.locals[self.part])

    def gather(self, into: Tensor) -> None:
        """Copy the parameters."""
        torch._foreach_copy_(list(into.unbind(0)), self.locals)

    def gather_grads(self, into: Tensor, part: slice) -> None:
        """Copy the gradients of ``part``."""
        grads = [self.layout.local(p.grad) for p in self.parameters[part] if p.grad is not None]
        if grads:
            torch._foreach_copy_(list(into.unbind(0)), grads)

    def scatter(self, y: Tensor) -> None:
        """Set the parameters to the slices of y."""
        torch._foreach_copy_(self.locals, list(y.unbind(0)))

    def refresh(self) -> None:
        """Look up where the parameters are stored, which an optimizer that writes ``p.data = …`` changes."""
        self.locals = [self.layout.local(p.detach()) for p in self.parameters]

    def places_not_finite(self, slab: Tensor) -> list[int]:
        """Which slices of the slab (B, …) hold NaN or infinite entries, on any rank that holds their rows."""
        # A sum is not finite if an entry is not; the rare sum that overflows is looked at again, entry by entry.
        if math.isfinite(float(self.layout.sum_(slab.sum()))):
            return []
        broken = self.layout.sum_((~slab.isfinite()).reshape(len(slab), -1).sum(dim=1))
        return [i for i, count in enumerate(broken.tolist()) if count]

    def gradient_(self, x: Tensor, g: Tensor, workspace: Workspace, *, metric: str) -> None:
        """Replace the Euclidean gradient g at x by the Riemannian one of this manifold, or of the canonical metric."""
        assert self.manifold is not None
        g.copy_(self.doubled(x, g) if metric == "canonical" else self.manifold.egrad2rgrad(x, g))

    def double_(self, x: Tensor, d: Tensor, workspace: Workspace) -> None:
        """Replace the displacement d by the canonical-gradient map of it."""
        d.copy_(self.doubled(x, d))

    def doubled(self, x: Tensor, g: Tensor) -> Tensor:
        """``P (g − x gᵀ x)``: the canonical metric's gradient of g. On a displacement it doubles the rotation."""
        if not isinstance(self.manifold, RestrictedStiefel):
            raise ValueError(
                f"metric_pre='canonical' and tangent_post='double' belong to RestrictedStiefel, got "
                f"{type(self.manifold).__name__}: use corrected()"
            )
        return self.manifold._project_out(g - x @ (g.mT @ x))

    def move_(self, x: Tensor, d: Tensor, vectors: Sequence[Tensor], workspace: Workspace, *, tangent: bool) -> None:
        """Replace the displacement d by the point it leads to from x, and carry ``vectors`` there.

        ``tangent`` says that the vectors lie off the protected subspace already.
        """
        manifold: Any = self.manifold
        ours = isinstance(manifold, RestrictedStiefel)  # takes tangent parts itself, with one projection
        step = d if ours else manifold.proju(x, d)
        carried = [manifold.retr_transp(x, step, v if ours else manifold.proju(x, v))[1] for v in vectors]
        d.copy_(manifold.retr(x, step))
        for v, new in zip(vectors, carried, strict=True):
            v.copy_(new)

    def polish_(self, y: Tensor) -> None:
        """Replace y by the nearest points, computed in float64."""
        assert self.manifold is not None
        y.copy_(self.manifold.projx(y.double()))

    def norm_squared(self, x: Tensor, g: Tensor) -> Tensor:
        """The squared length of tangent vectors g, all of them together, in the manifold's metric."""
        assert self.manifold is not None
        return self.manifold.inner(x, g).sum()

    def is_current(self) -> bool:
        """Whether the members' complements and storage are those this bucket was made of."""
        return self.stamp == stamp(self.members)


def bucketed(
    members: Iterable[Member], *, state_key: Callable[[Tensor], Hashable] = lambda p: None
) -> list[list[Member]]:
    """The members, grouped by what lets them batch, in slabs; order is kept inside a group.

    ``state_key`` separates points whose optimizer state cannot be one tensor.
    """
    groups: dict[Hashable, list[Member]] = {}
    for member in members:
        p, manifold = member
        if batches(member):
            size_class = -(-manifold.width * CLASSES // p.shape[-2])
            rules = (manifold.retraction, manifold.metric, manifold.transport)
            shape = (p.shape, p.dtype, p.device, layout_of(p))
            key: Hashable = (*shape, *rules, size_class, state_key(p))
        else:
            key = (id(p),)
        groups.setdefault(key, []).append(member)
    return [slab for group in groups.values() for slab in _slabs(group)]


def batches(member: Member) -> bool:
    """Whether points of this manifold batch: restricted Stiefel manifolds do, by stacking their complements."""
    return isinstance(member.manifold, RestrictedStiefel)


def stamp(members: Sequence[Member]) -> tuple[tuple[int, ...], ...]:
    """Changes whenever a parameter's storage, or the content of its complement, does."""
    bases = (getattr(member.manifold, "complement", None) for member in members)
    return tuple(
        (id(member.parameter), _address(member.parameter), id(basis), _written(basis))
        for member, basis in zip(members, bases, strict=True)
    )


def _address(p: Tensor) -> int:
    return (p.to_local() if is_dtensor(p) else p).data_ptr()  # type: ignore[attr-defined]


def _written(basis: Tensor | None) -> int:
    """How often it was written to; never, where torch does not count because it was made in inference mode."""
    return 0 if basis is None or basis.is_inference() else basis._version


def _slabs(group: list[Member]) -> list[list[Member]]:
    first = layout_of(group[0].parameter).local(group[0].parameter)
    limit = max(1, SLAB.get(first.device.type, SLAB_ELSEWHERE) // max(first.nbytes, 1))
    return [group[i : i + limit] for i in range(0, len(group), limit)]


def _batched(members: Sequence[Member]) -> RestrictedStiefel:
    first = members[0].parameter
    manifolds = [member.manifold for member in members]
    if first.ndim == 2 or not any(manifold.width for manifold in manifolds):
        return RestrictedStiefel.stack(manifolds if first.ndim == 2 else manifolds[:1])
    # A parameter that is a batch itself brings a basis for each of its points, or one for all of them.
    batch = first.shape[:-2]
    none = first.detach().new_zeros(first.shape[-2], 0)
    own = [none if manifold.complement is None else manifold.complement for manifold in manifolds]
    bases = [basis.expand(*batch, -1, -1).flatten(0, -3).unbind(0) for basis in own]
    complement = stack_bases([basis for each in bases for basis in each], first.shape[-2], like=first.detach())
    shared = manifolds[0]
    return RestrictedStiefel(
        complement.reshape(len(members), *batch, *complement.shape[-2:]),
        retraction=shared.retraction,
        metric=shared.metric,
        transport=shared.transport,
    )
