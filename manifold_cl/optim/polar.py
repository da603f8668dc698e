"""The common case without temporaries: restricted Stiefel points that retract by polar, in place on scratch memory.

Same sums in the same order as the manifold's own verbs, so the same bits on a CPU at ordinary shapes (n and p in the
tens at least; tiny products take other paths), except where a nearly full complement is replaced by its own (`DUAL`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.long_steps import is_long, shortened
from manifold_cl.geometry.retractions import Polar
from manifold_cl.geometry.subspace import stack_bases
from manifold_cl.linalg import (
    FAR,
    LARGE,
    full_precision,
    gram_size,
    inverse_sqrt_deficit,
    polar_far,
    small_deficit,
    sym,
)
from manifold_cl.optim.buckets import Bucket, Member, Workspace
from manifold_cl.optim.layout import Layout, Whole

DUAL = 0.75
"""Share of protected directions from which x ↦ Q Qᵀx, Q spanning the rest, replaces x − F Fᵀx: a third of the work."""
DUAL_ROWS = 2048
"""Largest n for which Q is computed: its QR costs about n / 16 steps' worth of what it saves, seconds at this size."""
OWN_BASIS = 1 << 20
"""Bytes from which a basis on a CPU is multiplied where it is, not copied into a stack: as fast."""


class PolarBucket(Bucket):
    """A bucket whose verbs work in place on scratch memory; rows may be spread over ranks."""

    refuses_nan = False

    @staticmethod
    def fits(member: Member) -> bool:
        """Whether the member's manifold is one this class knows."""
        p, manifold = member
        return (
            type(manifold) is RestrictedStiefel
            and isinstance(manifold.retraction, Polar)
            and manifold.transport == "projection"
            and p.ndim == 2
        )

    def prepare(self, own: Sequence[Member]) -> None:
        """Lay out the complements: stacked, one by one, or as their own complements."""
        self.metric = self.members[0].manifold.metric
        self.projector = Projector(own, self.layout)

    def gradient_(self, x: Tensor, g: Tensor, workspace: Workspace, *, metric: str) -> None:
        """Replace the Euclidean gradient g at x by the Riemannian one."""
        with full_precision(x.device):
            if "canonical" in (metric, self.metric):
                self._subtract(g, x, self._gram(g, x, workspace), workspace)
            else:
                self._subtract(g, x, sym(self._gram(x, g, workspace)), workspace)
            self.projector.apply_(g, workspace)

    def double_(self, x: Tensor, d: Tensor, workspace: Workspace) -> None:
        """Replace the displacement d by the canonical-gradient map of it."""
        with full_precision(x.device):
            self._subtract(d, x, self._gram(d, x, workspace), workspace)
            self.projector.apply_(d, workspace)

    def move_(self, x: Tensor, d: Tensor, vectors: Sequence[Tensor], workspace: Workspace, *, tangent: bool) -> None:
        """Replace the displacement d by ``polar(x + tangent part of d)`` and project ``vectors`` there.

        The normal part leaves first and P is applied to the sum x + d last: in the other order a drifted x would put
        its leak times the normal part back (docs/geometry.md, section 3).
        """
        with full_precision(x.device):
            if not is_long(d, total=self.layout.sum_):
                self._move(x, d, vectors, workspace, tangent=tangent)
                return
            wide, carried = shortened(d.double(), total=self.layout.sum_), [v.double() for v in vectors]
            self._move(x.double(), wide, carried, Workspace(), tangent=tangent, polish=True)
            for narrow, result in zip((d, *vectors), (wide, *carried), strict=True):
                narrow.copy_(result)

    def _move(
        self,
        x: Tensor,
        d: Tensor,
        vectors: Sequence[Tensor],
        workspace: Workspace,
        *,
        tangent: bool,
        polish: bool = False,
    ) -> None:
        self._subtract(d, x, sym(self._gram(x, d, workspace)), workspace)
        y = d.add_(x)
        if self.projector.width:
            self.projector.apply_(y, workspace)
            y.sub_(x).add_(x)  # the sum as a retraction of (x, u) forms it
        self._polish(y, workspace)
        if polish:
            self._polish(self.projector.apply_(y, workspace), workspace)
        for v in vectors:
            self._subtract(v, y, sym(self._gram(y, v, workspace)), workspace)
            if not tangent:
                self.projector.apply_(v, workspace)

    def polish_(self, y: Tensor) -> None:
        """Replace y by the nearest points, computed in float64."""
        workspace, wide = Workspace(), y.double()
        self._polish(self.projector.apply_(wide, workspace), workspace)
        y.copy_(wide)

    def norm_squared(self, x: Tensor, g: Tensor) -> Tensor:
        """The squared length of tangent vectors g, all of them together, in the manifold's metric."""
        with full_precision(x.device):
            total = self.layout.sum_(g.square().sum())
            if self.metric == "canonical":
                total = total - self.layout.sum_(x.mT @ g).square().sum() / 2
            return total

    def _polish(self, y: Tensor, workspace: Workspace) -> None:
        """Replace y by ``y(yᵀy)^(-1/2)``, as `polar_near` does."""
        eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        error = self._gram(y, y, workspace) - eye
        size = gram_size(error)
        if not size <= FAR:
            y.copy_(polar_far(y, total=self.layout.sum_))
            return
        self._subtract(y, y, inverse_sqrt_deficit(error), workspace)
        if size > LARGE:
            self._subtract(y, y, small_deficit(self._gram(y, y, workspace) - eye), workspace)

    def _gram(self, a: Tensor, b: Tensor, workspace: Workspace) -> Tensor:
        p = a.shape[-1]
        gram = workspace.take("gram", (*a.shape[:-2], p, p), a)
        return self.layout.sum_(torch.bmm(a.mT, b, out=gram))

    @staticmethod
    def _subtract(z: Tensor, a: Tensor, factor: Tensor, workspace: Workspace) -> None:
        """``z ← z − a factor``."""
        z.sub_(torch.bmm(a, factor, out=workspace.take("product", z.shape, z)))


class Projector:
    """``P = I − F Fᵀ`` for B points, each with its own F, applied in place."""

    def __init__(self, members: Sequence[Member], layout: Layout) -> None:
        self.layout = layout
        manifolds = [member.manifold for member in members]
        self.width = max((manifold.width for manifold in manifolds), default=0)
        self.dual = False
        self.stacked: Tensor | None = None
        self.bases: list[Tensor] = []
        if not self.width:
            return
        like = layout.local(members[0].parameter.detach())
        n = members[0].parameter.shape[-2]
        bases = [None if manifold.complement is None else manifold.complement.to(like) for manifold in manifolds]
        if self.width >= DUAL * n and n <= DUAL_ROWS and all(b is not None and b.shape[-1] > n // 2 for b in bases):
            self.dual = True
            bases = [rest_of(basis) for basis in bases if basis is not None]
        local = [None if basis is None else layout.rows(basis) for basis in bases]
        widest = max(basis.nbytes for basis in local if basis is not None)
        if like.device.type == "cpu" and widest >= OWN_BASIS and all(basis is not None for basis in local):
            self.bases = [basis for basis in local if basis is not None]
        else:
            self.stacked = stack_bases(local, like.shape[-2], like=like)

    def apply_(self, z: Tensor, workspace: Workspace) -> Tensor:
        """``z ← P z``, returned. O(n k p) per point; the coefficients Fᵀz are all that ranks exchange."""
        if not self.width:
            return z
        product = workspace.take("product", z.shape, z)
        # (zᵀF) rather than Fᵀz: the same sums in the same order, and a sixth faster for a tall F on a CPU.
        if self.stacked is not None:
            basis = self.stacked.to(z.dtype)
            inside = workspace.take("inside", (*z.shape[:-2], z.shape[-1], basis.shape[-1]), z)
            self.layout.sum_(torch.bmm(z.mT, basis, out=inside))
            torch.bmm(basis, inside.mT, out=product)
        else:
            bases = [basis.to(z.dtype) for basis in self.bases]
            p = z.shape[-1]
            flat = workspace.take("inside", (sum(p * basis.shape[-1] for basis in bases),), z)
            parts = [part.view(p, -1) for part in torch.split(flat, [p * basis.shape[-1] for basis in bases])]
            if isinstance(self.layout, Whole):  # one basis after the other: the second product finds it in cache
                for one, out, basis, part in zip(z, product, bases, parts, strict=True):
                    torch.mm(basis, torch.mm(one.T, basis, out=part).T, out=out)
            else:
                for one, basis, part in zip(z, bases, parts, strict=True):
                    torch.mm(one.T, basis, out=part)
                self.layout.sum_(flat)
                for out, basis, part in zip(product, bases, parts, strict=True):
                    torch.mm(basis, part.T, out=out)
        return z.copy_(product) if self.dual else z.sub_(product)


def rest_of(basis: Tensor) -> Tensor:
    """An orthonormal basis of what ``basis`` (n, k) leaves free, zero columns not counted. O(n³), in float64."""
    live = (basis != 0).any(dim=0)
    k = int(live.sum())
    complete = torch.linalg.qr(basis[:, live].double(), mode="complete")[0]
    rest: Tensor = complete[:, k:].to(basis.dtype).contiguous()
    return rest
