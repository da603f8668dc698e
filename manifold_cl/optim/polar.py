"""The geometry of a bucket in the common case: polar retraction on restricted Stiefel manifolds, in place.

The same sums in the same order as the manifold's own methods, so the same bits on a CPU at ordinary shapes (n and p in
the tens at least; tiny products take other paths). The exception is a nearly full complement, see `DUAL`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.long_steps import is_long, shortened
from manifold_cl.geometry.metrics import METRICS
from manifold_cl.geometry.retractions import Polar
from manifold_cl.geometry.subspace import stack_bases
from manifold_cl.layouts import Layout, Whole
from manifold_cl.linalg import (
    FAR,
    LARGE,
    NEAR,
    full_precision,
    gram,
    gram_size,
    inverse_sqrt_deficit,
    is_capturing,
    polar_far,
    small_deficit,
    sym,
)

DUAL = 0.75
"""Share of protected directions from which x ↦ Q Qᵀx, Q spanning the rest, replaces x − F Fᵀx: a third of the work."""
DUAL_ROWS = 2048
"""Largest n for which Q is computed: its QR costs about n / 16 steps' worth of what it saves, seconds at this size."""
OWN_BASIS = 1 << 20
"""Bytes from which a basis on a CPU is multiplied where it is, not copied into a stack: as fast."""


class Workspace:
    """Scratch memory of a step: one buffer per slot, as large as the largest request so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, slot: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of this shape, dtype and device as ``like``, content arbitrary; the next call reuses its memory.

        While a CUDA graph is captured, memory of the graph: buffers here may be freed before it is replayed.
        """
        if is_capturing():
            return torch.empty(*shape, dtype=like.dtype, device=like.device)
        key, size = (slot, like.device, like.dtype), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size].view(*shape)

    def release(self, dtype: torch.dtype) -> None:
        """Free the buffers of this dtype."""
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key[2] != dtype}

    @property
    def nbytes(self) -> int:
        """The number of bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class PolarGeometry:
    """Gradient, retraction and transport of B points (B, n, p) at once; rows may be spread over ranks.

    ``manifolds`` holds one per point, each accepted by `fits`; ``like`` is what this rank stores of one point.
    """

    tolerates_nan = True
    """NaN stays in its point: nothing here raises for it."""

    def __init__(
        self, manifolds: Sequence[RestrictedStiefel], like: Tensor, layout: Layout, workspace: Workspace
    ) -> None:
        self.layout, self.workspace = layout, workspace
        self.canonical = bool(manifolds) and manifolds[0].metric == "canonical"
        self.projector = Projector(manifolds, like, layout, workspace)

    @staticmethod
    def fits(p: Tensor, manifold: Any) -> bool:
        """Whether p, a point of ``manifold``, can step here."""
        return (
            type(manifold) is RestrictedStiefel
            and isinstance(manifold.retraction, Polar)
            and manifold.transport == "projection"
            and manifold.metric in METRICS  # a `BetaMetric` has another gradient
            and p.ndim == 2
        )

    def gradient_(self, x: Tensor, g: Tensor) -> None:
        """Replace the Euclidean gradient g at x by the Riemannian gradient in the manifolds' metric."""
        if self.canonical:
            self.canonical_(x, g)
            return
        with full_precision(x.device):
            self._subtract(g, x, sym(self._gram(x, g)))
            self.projector.apply_(g)

    def canonical_(self, x: Tensor, g: Tensor) -> None:
        """Replace g by ``P (g − x gᵀ x)``: the canonical metric's gradient of g."""
        with full_precision(x.device):
            self._subtract(g, x, self._gram(g, x))
            self.projector.apply_(g)

    def retract_(
        self, x: Tensor, d: Tensor, vectors: Sequence[Tensor], *, off_complement: bool, tangent: bool = True
    ) -> None:
        """Replace the displacement d by ``polar(x + tangent part of d)`` and project ``vectors`` there.

        Without ``tangent``, by ``polar(P (x + d))``, the nearest point.

        The normal part leaves first, and P is applied to the sum x + d last. In the other order a drifted x would put
        its leak times the normal part back (docs/geometry.md, "Project the sum"). ``off_complement``: the vectors lie
        off the protected subspace already.
        """
        with full_precision(x.device):
            if not is_long(d, total=self.layout.sum_):
                self._retract(x, d, vectors, off_complement=off_complement, tangent=tangent)
                return
            wide, carried = shortened(d.double(), total=self.layout.sum_), [v.double() for v in vectors]
            self._retract(x.double(), wide, carried, off_complement=off_complement, tangent=tangent, polish=True)
            for narrow, result in zip((d, *vectors), (wide, *carried), strict=True):
                narrow.copy_(result)
            self._release_wide(x)

    def _retract(
        self,
        x: Tensor,
        d: Tensor,
        vectors: Sequence[Tensor],
        *,
        off_complement: bool,
        tangent: bool,
        polish: bool = False,
    ) -> None:
        if tangent:
            self._subtract(d, x, sym(self._gram(x, d)))
        y = d.add_(x)
        if self.projector.width:
            self.projector.apply_(y)
            y.sub_(x).add_(x)  # the sum as a retraction of (x, u) forms it
        self._orthonormalize(y, far=FAR if tangent else NEAR)
        if polish:
            self._orthonormalize(self.projector.apply_(y))
        for v in vectors:
            self._subtract(v, y, sym(self._gram(y, v)))
            if not off_complement:
                self.projector.apply_(v)

    def polish_(self, y: Tensor) -> None:
        """Replace y by the nearest points, computed in float64."""
        wide = y.double()
        self._orthonormalize(self.projector.apply_(wide))
        y.copy_(wide)
        self._release_wide(y)

    def norm_squared(self, x: Tensor, g: Tensor) -> Tensor:
        """The squared length of all tangent vectors g together, in the manifolds' metric."""
        with full_precision(x.device):
            total = self.layout.sum_(g.square().sum())
            if self.canonical:
                total = total - self.layout.sum_(x.mT @ g).square().sum() / 2
            return total

    def _orthonormalize(self, y: Tensor, *, far: float = FAR) -> None:
        """Replace y by ``y(yᵀy)^(-1/2)``, as `polar_near` does."""
        eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        error = self._gram(y, y) - eye
        size = gram_size(error)
        if not size <= far:
            y.copy_(polar_far(y, total=self.layout.sum_))
            return
        self._subtract(y, y, inverse_sqrt_deficit(error))
        if size > LARGE:
            self._subtract(y, y, small_deficit(self._gram(y, y) - eye))

    def _release_wide(self, x: Tensor) -> None:
        if x.dtype != torch.float64:
            self.workspace.release(torch.float64)

    def _gram(self, a: Tensor, b: Tensor) -> Tensor:
        p = a.shape[-1]
        return self.layout.sum_(gram(a, b, out=self.workspace.take("gram", (*a.shape[:-2], p, p), a)))

    def _subtract(self, z: Tensor, a: Tensor, factor: Tensor) -> None:
        """``z ← z − a factor``."""
        z.sub_(torch.bmm(a, factor, out=self.workspace.take("product", z.shape, z)))


class Projector:
    """``P = I − F Fᵀ`` for B points, each with its own F, applied in place."""

    def __init__(
        self, manifolds: Sequence[RestrictedStiefel], like: Tensor, layout: Layout, workspace: Workspace
    ) -> None:
        self.layout, self.workspace = layout, workspace
        self.width = max((manifold.width for manifold in manifolds), default=0)
        self.dual = False
        self.stacked: Tensor | None = None
        self.bases: list[Tensor] = []
        if not self.width:
            return
        bases = [None if manifold.complement is None else manifold.complement.to(like) for manifold in manifolds]
        n = next(basis.shape[-2] for basis in bases if basis is not None)
        if self.width >= DUAL * n and n <= DUAL_ROWS and all(b is not None and b.shape[-1] > n // 2 for b in bases):
            self.dual = True
            bases = [rest_of(basis) for basis in bases if basis is not None]
        local = [None if basis is None else layout.rows(basis) for basis in bases]
        widest = max(basis.nbytes for basis in local if basis is not None)
        if like.device.type == "cpu" and widest >= OWN_BASIS and all(basis is not None for basis in local):
            self.bases = [basis for basis in local if basis is not None]
        else:
            self.stacked = stack_bases(local, like.shape[-2], like=like)

    def apply_(self, z: Tensor) -> Tensor:
        """``z ← P z``, returned. O(n k p) per point; ranks exchange only the coefficients Fᵀz."""
        if not self.width:
            return z
        product = self.workspace.take("product", z.shape, z)
        # (zᵀF) rather than Fᵀz: the same sums in the same order, and a sixth faster for a tall F on a CPU.
        if self.stacked is not None:
            basis = self.stacked.to(z.dtype)
            inside = self.workspace.take("inside", (*z.shape[:-2], z.shape[-1], basis.shape[-1]), z)
            self.layout.sum_(torch.bmm(z.mT, basis, out=inside))
            torch.bmm(basis, inside.mT, out=product)
        else:
            self._multiply_each([basis.to(z.dtype) for basis in self.bases], z, product)
        return z.copy_(product) if self.dual else z.sub_(product)

    def _multiply_each(self, bases: Sequence[Tensor], z: Tensor, product: Tensor) -> None:
        p = z.shape[-1]
        sizes = [p * basis.shape[-1] for basis in bases]
        flat = self.workspace.take("inside", (sum(sizes),), z)
        parts = [part.view(p, -1) for part in torch.split(flat, sizes)]
        if isinstance(self.layout, Whole):  # one basis after the other: the second product finds it in cache
            for one, out, basis, part in zip(z, product, bases, parts, strict=True):
                torch.mm(basis, torch.mm(one.T, basis, out=part).T, out=out)
            return
        for one, basis, part in zip(z, bases, parts, strict=True):
            torch.mm(one.T, basis, out=part)
        self.layout.sum_(flat)
        for out, basis, part in zip(product, bases, parts, strict=True):
            torch.mm(basis, part.T, out=out)


def rest_of(basis: Tensor) -> Tensor:
    """An orthonormal basis of the orthogonal complement of ``basis`` (n, k); zero columns do not count. O(n³)."""
    live = (basis != 0).any(dim=0)
    k = int(live.sum())
    complete = torch.linalg.qr(basis[:, live].double(), mode="complete")[0]
    rest: Tensor = complete[:, k:].to(basis.dtype).contiguous()
    return rest
