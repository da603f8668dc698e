"""Buckets: points that step together as one batched tensor, equal in shape, dtype, device and kind of manifold."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.subspace import stack_bases
from manifold_cl.layouts import RowSharded, is_dtensor, layout_of
from manifold_cl.linalg import is_capturing
from manifold_cl.optim.base_step import Bank, State, bank_key, is_elementwise
from manifold_cl.optim.distributed import Owners
from manifold_cl.optim.polar import PolarGeometry, Workspace
from manifold_cl.optim.validation import Group, rate_of, scale_of

CLASSES = 16
"""Size classes of complements: widths within the same sixteenth of n are padded to one, at most 6 % of n too wide."""
SLAB = {"cpu": 1 << 20}
"""Bytes of points that step at once: on a CPU what its cache holds beside moments and gradient (bench_step.py)."""
SLAB_ELSEWHERE = 1 << 26
"""The same on an accelerator, where few launches matter more than cache; the bound is for memory."""
UNSHARDED = "keep the adapters out of fully_shard (ignored_params)"
SCALED = ("RMSprop",)
"""Optimizers that average gradients after the element-wise scaling, which takes them off the complement's plane."""


class Member(NamedTuple):
    """A parameter and the manifold that it lies on (any geoopt manifold)."""

    parameter: Tensor
    manifold: Any


class ManifoldGeometry:
    """Gradient, retraction and transport of B points at once, by the methods of any geoopt manifold."""

    tolerates_nan = False
    """Decompositions may raise where an entry is not finite."""

    def __init__(self, manifold: Any) -> None:
        self.manifold = manifold

    def gradient_(self, x: Tensor, g: Tensor) -> None:
        """Replace the Euclidean gradient g at x by the Riemannian gradient in the manifold's metric."""
        g.copy_(self.manifold.egrad2rgrad(x, g))

    def canonical_(self, x: Tensor, g: Tensor) -> None:
        """Replace g by ``P (g − x gᵀ x)``: the canonical metric's gradient of g."""
        if not isinstance(self.manifold, RestrictedStiefel):
            raise ValueError(
                f"metric_pre='canonical' and tangent_post='double' belong to RestrictedStiefel, got "
                f"{type(self.manifold).__name__}: use step_rule='corrected'"
            )
        g.copy_(self.manifold._project_out(g - x @ (g.mT @ x)))

    def retract_(
        self, x: Tensor, d: Tensor, vectors: Sequence[Tensor], *, off_complement: bool, tangent: bool = True
    ) -> None:
        """Replace the displacement d by the point that its tangent part leads to, and carry ``vectors`` there.

        Without ``tangent``, by the point nearest to x + d.
        """
        manifold = self.manifold
        if not tangent:
            d.copy_(manifold.projx(x + d))
            for v in vectors:
                v.copy_(manifold.proju(d, v))
            return
        ours = type(manifold) is RestrictedStiefel  # takes tangent parts itself, with one projection
        step = d if ours else manifold.proju(x, d)
        carried = [manifold.retr_transp(x, step, v if ours else manifold.proju(x, v))[1] for v in vectors]
        d.copy_(manifold.retr(x, step))
        for v, new in zip(vectors, carried, strict=True):
            v.copy_(new)

    def polish_(self, y: Tensor) -> None:
        """Replace y by the nearest points, computed in float64."""
        y.copy_(self.manifold.projx(y.double()))

    def norm_squared(self, x: Tensor, g: Tensor) -> Tensor:
        """The squared length of all tangent vectors g together, in the manifold's metric."""
        total: Tensor = self.manifold.inner(x, g).sum()
        return total


class Bucket:
    """B points that step together. Slabs are their values, gradients or displacements as one tensor (B, …).

    ``members`` are equal in shape, dtype, device, layout and kind of manifold. With ``owners``, each rank computes the
    geometry of its own part. ``index`` is the position in the plan.
    """

    bank: Bank | None = None
    """The base optimizer's state, where that can be one tensor."""
    base = ""
    """Name of the base optimizer."""

    def __init__(
        self, members: Sequence[Member], workspace: Workspace, *, owners: Owners | None = None, index: int = 0
    ) -> None:
        self.members, self.workspace, self.index = list(members), workspace, index
        self.owners = owners
        self.parts = [slice(0, len(members))] if owners is None else owners.parts(len(members), index)
        self.part = self.parts[0 if owners is None else owners.rank]
        self.layout = layout_of(self.members[0].parameter)
        self.parameters = [member.parameter for member in self.members]
        self.locals = [self.layout.local(p.detach()) for p in self.parameters]
        self.shape = (len(self.members), *self.locals[0].shape)
        self.stamp = stamp(self.members)
        self.geometry = self._make_geometry()

    def _make_geometry(self) -> PolarGeometry | ManifoldGeometry:
        own = self.members[self.part]
        manifolds = [member.manifold for member in own]
        if PolarGeometry.fits(*self.members[0]):
            return PolarGeometry(manifolds, self.locals[0], self.layout, self.workspace)
        if isinstance(self.layout, RowSharded):
            manifold = self.members[0].manifold
            retraction = getattr(getattr(manifold, "retraction", None), "name", type(manifold).__name__)
            raise ValueError(
                f"points sharded by rows retract by 'polar' with the projection transport, which need only p × p sums; "
                f"got {retraction!r}: use those, or {UNSHARDED}"
            )
        return ManifoldGeometry(None if not own else manifolds[0] if not can_batch(own[0]) else _batched(own))

    # The verbs of a step ----------------------------------------------------------------------------

    def points(self) -> Tensor:
        """The points x (B, …)."""
        return self.gather_(self.slab("x"))

    def gradients(self) -> Tensor:
        """The Euclidean gradients (B, …)."""
        g = self.slab("g")
        grads = [self.layout.local(p.grad) for p in self.parameters if p.grad is not None]
        torch._foreach_copy_(list(g.unbind(0)), grads)
        return g

    def riemannian_(self, x: Tensor, g: Tensor, metric: str) -> Tensor:
        """Replace the Euclidean gradients g by Riemannian ones; ``metric`` as in the option ``metric_pre``."""
        if metric == "none":
            return g
        if (own := self.part).stop > own.start:
            (self.geometry.canonical_ if metric == "canonical" else self.geometry.gradient_)(x[own], g[own])
        return self._shared(g)

    def scale_(self, d: Tensor, options: Group) -> Tensor:
        """Multiply the displacements d by the factor of the option ``step_scale``."""
        n, p = (d.shape[1], 1) if d.ndim == 2 else d.shape[-2:]  # a vector is one column
        scale = scale_of(options, n, p)
        return d if scale == 1 else d.mul_(scale)

    def canonical_(self, x: Tensor, d: Tensor) -> Tensor:
        """Replace the displacements d by ``P (d − x dᵀ x)``, which doubles the rotation in them."""
        if (own := self.part).stop > own.start:
            self.geometry.canonical_(x[own], d[own])
        return d

    def retract_(self, x: Tensor, d: Tensor, moments: Sequence[Tensor], options: Group) -> Tensor:
        """Replace the displacements d by the points that they lead to from x, and carry ``moments`` there.

        Points that did not move stay the same to the bit. Points that would not be finite become NaN.
        """
        if rate_of(options) == 0:
            return d.copy_(x)
        if (own := self.part).stop > own.start:
            self._retract_own(x[own], d[own], [v[own] for v in moments], options)
        for slab in moments:
            self._shared(slab)
        return self._shared(d)

    def _retract_own(self, x: Tensor, d: Tensor, moments: Sequence[Tensor], options: Group) -> None:
        exact = self.bank is None or rate_of(options) is None  # with a bank and a known rate, all points move
        still = (d == 0).reshape(len(d), -1).all(dim=1) if exact else None
        broken = [] if self.geometry.tolerates_nan else self.nonfinite(d)
        if broken:
            d[broken] = 0
        off_complement = self.bank is not None and self.base not in SCALED and options["metric_pre"] != "none"
        tangent = options["tangent_post"] != "none"
        self.geometry.retract_(x, d, moments, off_complement=off_complement, tangent=tangent)
        if options["polish_every"] and options["steps"] % options["polish_every"] == 0:
            self.geometry.polish_(d)
        if broken:
            d[broken] = torch.nan
        if still is not None and (is_capturing() or bool(still.any())):
            d.copy_(torch.where(still.reshape(-1, *[1] * (d.ndim - 1)), x, d))  # a retraction would round

    def require_capturable(self) -> None:
        """Refuse points whose step asks the host."""
        if not isinstance(self.geometry, PolarGeometry) or isinstance(self.layout, RowSharded):
            raise ValueError(
                "capturable=True steps complete points of RestrictedStiefel with the retraction 'polar' and the "
                f"projection transport, got {self.members[0].manifold} of shape {self.shape[1:]}"
            )

    def nonfinite(self, slab: Tensor) -> list[int]:
        """Indices of the members of the slab with NaN or infinite entries, on any rank that holds their rows."""
        # A sum is not finite if an entry is not; the rare sum that overflows is examined again, entry by entry.
        if math.isfinite(float(self.layout.sum_(slab.sum()))):
            return []
        broken = self.layout.sum_((~slab.isfinite()).reshape(len(slab), -1).sum(dim=1))
        return [i for i, count in enumerate(broken.tolist()) if count]

    def write(self, y: Tensor) -> None:
        """Set the parameters to y (B, …)."""
        torch._foreach_copy_(self.locals, list(y.unbind(0)))

    def norm_squared(self) -> Tensor | float:
        """The squared norm of the Riemannian gradients of this rank's part."""
        x, g = self.points()[self.part], self.gradients()[self.part]
        if not len(x):
            return 0.0
        self.geometry.gradient_(x, g)
        return self.geometry.norm_squared(x, g).cpu()

    # Memory -----------------------------------------------------------------------------------------

    def slab(self, name: str) -> Tensor:
        """Scratch memory (B, …), content arbitrary: "x", "g" or "y".

        Results y are kept until all points are computed. Where the base optimizer steps once for all parameters, x and
        g are needed until then, and y may replace g. Slabs of these names are the bucket's own; others share one.
        """
        own = name == "y" or self.bank is None
        return self.workspace.take(f"{name}{self.index}" if own else name, self.shape, self.locals[0])

    def gather_(self, slab: Tensor) -> Tensor:
        """Fill the slab with the parameters."""
        torch._foreach_copy_(list(slab.unbind(0)), self.locals)
        return slab

    def refresh(self) -> None:
        """Update the storage addresses of the parameters, which ``p.data = …`` changes."""
        self.locals = [self.layout.local(p.detach()) for p in self.parameters]

    def _shared(self, slab: Tensor) -> Tensor:
        if self.owners is not None:
            self.owners.share_(slab, self.parts)
        return slab

    def is_current(self, states: MutableMapping[Tensor, State]) -> bool:
        """Whether complements, storage and states are those that this bucket was made of."""
        return (self.bank is None or self.bank.is_current(states)) and self.stamp == stamp(self.members)


class Plan:
    """The buckets of points that have a gradient, and the Euclidean parameters that have one, by group."""

    def __init__(self, base: type[Optimizer], owners: Owners | None = None) -> None:
        self.base, self.owners, self.elementwise = base, owners, is_elementwise(base)
        self.workspace = Workspace()
        self.buckets: list[tuple[Group, Bucket]] = []
        self.euclidean: list[tuple[Group, list[Tensor]]] = []
        self.skipped: Tensor | None = None
        """Steps that were skipped without asking the host, counted in one place that a CUDA graph writes to."""
        self._groups: list[Group] = []
        self._signature: tuple[int, ...] = ()

    def clear(self) -> None:
        """Make all buckets anew at the next update."""
        self.buckets, self.euclidean, self._signature = [], [], ()

    def update(
        self, groups: Sequence[Group], manifolds: Mapping[Tensor, Any], states: MutableMapping[Tensor, State]
    ) -> None:
        """Adapt to the groups, gradients and states; buckets that are still current are used again."""
        active = [[p for p in group["params"] if p.grad is not None] for group in groups]
        signature = (*map(id, groups), *(id(p) for params in active for p in params))
        current = [bucket for _, bucket in self.buckets if bucket.is_current(states)]
        if signature == self._signature and len(current) == len(self.buckets):
            return
        made = {(bucket.index, *map(id, bucket.parameters)): bucket for bucket in current}
        self.buckets, self.euclidean = [], []
        self._groups, self._signature = list(groups), signature  # the groups are held, so their ids stay theirs
        for group, params in zip(groups, active, strict=True):
            members = [Member(p, manifolds[p]) for p in params if p in manifolds]
            for slab in bucketed(members, state_key=lambda p: bank_key(states.get(p)) if self.elementwise else None):
                key = (len(self.buckets), *(id(member.parameter) for member in slab))
                self.buckets.append((group, made.get(key) or self._make(slab, states)))
            if rest := [p for p in params if p not in manifolds]:
                self.euclidean.append((group, rest))
        if self.skipped is None and self.buckets:
            self.skipped = torch.zeros((), dtype=torch.long, device=self.buckets[0][1].locals[0].device)

    def gradients(self) -> list[Tensor]:
        """Every gradient."""
        params = [p for _, bucket in self.buckets for p in bucket.parameters] + [
            p for _, ps in self.euclidean for p in ps
        ]
        return [p.grad for p in params if p.grad is not None]

    def copies(self, *, complete: bool) -> dict[Tensor, Tensor]:
        """Copies of the parameters that the base optimizer may write before all points are computed, or of all."""
        if self.elementwise and not complete:
            return {}
        copies = {p: p.detach().clone() for _, rest in self.euclidean for p in rest}
        for _, bucket in self.buckets:
            if self.elementwise:
                copies |= {p: p.detach().clone() for p in bucket.parameters}
            else:  # the points x are kept through the step anyway
                copies.update(zip(bucket.parameters, bucket.points().unbind(0), strict=True))
        return copies

    def grad_norm(self, manifolds: Mapping[Tensor, Any]) -> Tensor:
        """The norm of all gradients together, 0-d: Riemannian where a parameter is on a manifold."""
        total = torch.zeros((), dtype=torch.float64)
        for _, bucket in self.buckets:
            total += bucket.norm_squared()
        if self.owners is not None and manifolds:
            self.owners.add_(total, next(iter(manifolds)).device)
        for _, params in self.euclidean:
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            total += (norm.full_tensor() if is_dtensor(norm) else norm).double().cpu() ** 2  # type: ignore[attr-defined]
        return total.sqrt()

    def _make(self, slab: Sequence[Member], states: MutableMapping[Tensor, State]) -> Bucket:
        bucket = Bucket(slab, self.workspace, owners=self.owners, index=len(self.buckets))
        if isinstance(bucket.layout, RowSharded) and not self.elementwise:
            shape = tuple(slab[0].parameter.shape)
            raise ValueError(
                f"{self.base.__name__} takes statistics over whole matrices, and rows of a point of shape {shape} are "
                f"spread over ranks: use an element-wise optimizer, or {UNSHARDED}"
            )
        if self.elementwise:
            bucket.base = self.base.__name__
            bucket.bank = Bank([states.get(p) or {} for p in bucket.parameters], bucket.layout, bucket.parameters)
        return bucket


def bucketed(
    members: Iterable[Member], *, state_key: Callable[[Tensor], Hashable] = lambda p: None
) -> list[list[Member]]:
    """The members, grouped by what lets them batch, at most a slab each; order is kept inside a group.

    ``state_key`` separates points whose optimizer states cannot be one tensor.
    """
    groups: dict[Hashable, list[Member]] = {}
    for member in members:
        p, manifold = member
        if can_batch(member):
            size_class = -(-manifold.width * CLASSES // p.shape[-2])
            rules = (manifold.retraction, manifold.metric, manifold.transport)
            shape = (p.shape, p.dtype, p.device, layout_of(p))
            key: Hashable = (*shape, *rules, size_class, state_key(p))
        else:
            key = (id(p),)
        groups.setdefault(key, []).append(member)
    slabs = []
    for group in groups.values():
        first = layout_of(group[0].parameter).local(group[0].parameter)
        limit = max(1, SLAB.get(first.device.type, SLAB_ELSEWHERE) // max(first.nbytes, 1))
        slabs += [group[i : i + limit] for i in range(0, len(group), limit)]
    return slabs


def can_batch(member: Member) -> bool:
    """Whether points of this manifold batch: restricted Stiefel manifolds do, by stacking their complements.

    Not those of a subclass: a stack would not have the methods that it replaces.
    """
    return type(member.manifold) is RestrictedStiefel


def stamp(members: Sequence[Member]) -> tuple[tuple[int, ...], ...]:
    """A value that changes whenever a parameter's storage, or the content of its complement, does."""
    stamps = []
    for p, manifold in members:
        basis: Tensor | None = getattr(manifold, "complement", None)
        # torch counts the writes to a tensor, but none to tensors made in inference mode
        writes = 0 if basis is None or basis.is_inference() else basis._version
        address = (p.to_local() if is_dtensor(p) else p).data_ptr()  # type: ignore[attr-defined]
        stamps.append((id(p), address, id(basis), writes))
    return tuple(stamps)


def _batched(members: Sequence[Member]) -> RestrictedStiefel:
    first = members[0].parameter
    manifolds = [member.manifold for member in members]
    if first.ndim == 2 or not any(manifold.width for manifold in manifolds):
        return RestrictedStiefel.stack(manifolds if first.ndim == 2 else manifolds[:1])
    # A parameter that is a batch itself brings a basis per point, or one for all of its points.
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
