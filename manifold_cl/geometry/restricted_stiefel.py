"""The restricted Stiefel manifold as geoopt sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import geoopt
import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor

from manifold_cl.geometry.retractions import Retraction, as_retraction
from manifold_cl.geometry.subspace import ProtectedSubspace, check_basis
from manifold_cl.linalg import (
    Point,
    Tangent,
    full_precision,
    gram_error,
    polar_near,
    project_out,
    signed_qr,
    sym,
)

NEAR = 0.5
"""|xᵀx − I|_F below which Newton-Schulz projects in a few products; farther points take an SVD."""


class ConstraintError(NamedTuple):
    """How far a point is off the manifold: the largest entry of xᵀx − I and of Fᵀx."""

    orthonormality: float
    protection: float

    def __str__(self) -> str:
        return f"orthonormality {self.orthonormality:.1e}, protection {self.protection:.1e}"


class RestrictedStiefel(Manifold):  # type: ignore[misc]  # geoopt is not typed
    """``St(n, p; F) = {x : xᵀx = I, Fᵀx = 0}`` with the Euclidean metric.

    Geometrically the Stiefel manifold of the complement of F; in coordinates it stays in Rⁿ, so that its
    points are the factors a layer multiplies with. Passing ``complement=None`` protects nothing.

    The manifold, not the retraction, makes a vector tangent and applies ``P = I − FFᵀ`` to the *sum*
    x + u: a point that has drifted into F is brought back by every step, at the price of one projection.

    Args:
        complement: what points must be orthogonal to. A tensor (…, n, k) is orthonormalised in float64 unless it
            is orthonormal already; zero columns are legal padding. Kept in float32 or wider, whatever the
            module is converted to.
        retraction: a name, a `Retraction`, or a bare function of (x, u).

    Raises:
        ValueError: for a complement without full column rank, or an unknown retraction.
        TypeError: for a complement in half precision.
    """

    name = "RestrictedStiefel"
    ndim = 2
    reversible = False
    __scaling__ = Manifold.__scaling__.copy()

    complement: Tensor | None

    def __init__(
        self,
        complement: Tensor | ProtectedSubspace | None = None,
        *,
        retraction: Retraction | str | Callable[[Tensor, Tensor], Tensor] = "polar",
    ) -> None:
        super().__init__()
        self.retraction = as_retraction(retraction)
        if isinstance(complement, ProtectedSubspace):
            complement = complement.basis
        elif complement is not None:
            complement = _orthonormal(complement)
        self.register_buffer("complement", complement)

    # -- size -----------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Columns of the complement, zero padding included."""
        return 0 if self.complement is None else self.complement.shape[-1]

    @property
    def k(self) -> int:
        """Number of protected directions: columns that are not padding, in the batch member that has most."""
        if self.complement is None or not self.width:
            return 0
        return int((self.complement != 0).any(dim=-2).sum(-1).max())

    def dim(self, n: int, p: int) -> int:
        """``(n − k)p − p(p + 1)/2``, the dimension of the manifold of n × p points."""
        self._require_room(n, p)
        return (n - self.k) * p - p * (p + 1) // 2

    def capacity(self, p: int, n: int | None = None) -> int:
        """How many more directions can be protected before points of p columns have no room.

        ``n`` is needed where nothing is protected yet.
        """
        if n is None:
            if self.complement is None:
                raise ValueError("nothing is protected, so the manifold does not know n: pass n=")
            n = self.complement.shape[-2]
        return max(n - self.k - p, 0)

    def constraint_error(self, x: Point) -> ConstraintError:
        """Largest absolute entries of ``xᵀx − I`` and of ``Fᵀx``, measured in float64."""
        x = x.detach().double()
        leak = self._basis(x).mT @ x if self.width else x.new_zeros(1)
        return ConstraintError(float(gram_error(x).abs().max()), float(leak.abs().max()))

    # -- projections ----------------------------------------------------------------------------

    def projx(self, x: Point) -> Point:
        """The nearest point: the polar factor of ``P x``. Cheap near the manifold, an SVD far from it.

        Raises:
            ValueError: when P x has no p independent columns, so no nearest point exists.
        """
        with full_precision(x.device):
            y = self._project_out(x)
            error = gram_error(y)
            if float(torch.linalg.matrix_norm(error.detach()).max() if error.numel() else 0) < NEAR:
                return self._project_out(polar_near(y))
            left, sigma, right = torch.linalg.svd(self._project_out(y), full_matrices=False)
            # Against the size of x itself: what P leaves of a matrix inside F is rounding, of any rank.
            floor = torch.linalg.matrix_norm(x) * x.shape[-2] * torch.finfo(x.dtype).eps
            if bool((sigma[..., -1] <= floor).any()):
                raise ValueError(
                    f"no nearest point: outside the protected subspace x has rank below {x.shape[-1]} "
                    f"(singular values from {float(sigma.max()):.1e} to {float(sigma.min()):.1e})"
                )
            return self._project_out(left @ right)

    def proju(self, x: Point, u: Tangent) -> Tangent:
        """``P u − x sym(xᵀu)``, the orthogonal projection onto the tangent space at x. O(n p (k + p)).

        Source: geometry.md 4.2. Idempotent and self-adjoint; the identity on tangent vectors.
        """
        with full_precision(x.device):
            u = self._project_out(u)
            return u - x @ sym(x.mT @ u)

    def egrad2rgrad(self, x: Point, u: Tangent) -> Tangent:
        """The Riemannian gradient of the Euclidean gradient u: for this metric, its tangent projection."""
        return self.proju(x, u)

    # -- metric ---------------------------------------------------------------------------------

    def inner(self, x: Point, u: Tangent, v: Tangent | None = None, *, keepdim: bool = False) -> Tensor:
        """``tr(uᵀv)``, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        return (u * (u if v is None else v)).sum(dim=(-2, -1), keepdim=keepdim)

    # -- moving ---------------------------------------------------------------------------------

    def retr(self, x: Point, u: Tangent) -> Point:
        """The point reached by u, by this manifold's retraction; u need not be tangent, its tangent part counts."""
        with full_precision(x.device):
            return self._settled(self.retraction(x, self._step(x, u)))

    def expmap(self, x: Point, u: Tangent) -> Point:
        """The point at time 1 of the geodesic from x with velocity u (tangent part).

        ``[x u] expm([[A, −uᵀu], [I, A]])[:, :p] expm(−A)`` with A = xᵀu.
        Source: edelman1998geometry, section 2.2.2. O(n p²) + O(p³).
        """
        with full_precision(x.device):
            u = self._step(x, u)
            p = x.shape[-1]
            a, g = x.mT @ u, u.mT @ u
            eye = torch.eye(p, dtype=x.dtype, device=x.device).expand_as(a)
            generator = torch.cat([torch.cat([a, -g], dim=-1), torch.cat([eye, a], dim=-1)], dim=-2)
            factors = torch.matrix_exp(generator)[..., :p] @ torch.matrix_exp(-a)
            return polar_near(torch.cat([x, u], dim=-1) @ factors)

    def transp(self, x: Point, y: Point, v: Tangent) -> Tangent:
        """The projection of v, tangent at x, onto the tangent space at y."""
        return self.proju(y, v)

    def retr_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``retr(x, u)`` and v carried there."""
        y = self.retr(x, u)
        return y, self.transp(x, y, v)

    def expmap_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``expmap(x, u)`` and v carried there."""
        y = self.expmap(x, u)
        return y, self.transp(x, y, v)

    def transp_follow_retr(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """The vector v carried along the retraction curve of u."""
        return self.transp(x, self.retr(x, u), v)

    def transp_follow_expmap(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """The vector v carried along the geodesic of u."""
        return self.transp(x, self.expmap(x, u), v)

    # -- drawing --------------------------------------------------------------------------------

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> geoopt.ManifoldTensor:
        """A point drawn from the uniform (Haar) distribution, of shape ``size`` = (…, n, p).

        The orthonormal factor, with positive diagonal, of a Gaussian matrix projected off F.
        """
        self._require_shape(size)
        basis = self.complement
        device = device if device is not None else (None if basis is None else basis.device)
        dtype = dtype or (torch.get_default_dtype() if basis is None else basis.dtype)
        source = generator.device if generator is not None else device
        draw = torch.randn(*size, dtype=torch.float64, device=source, generator=generator).to(device)
        point = signed_qr(self._project_out(self._project_out(draw)))
        return geoopt.ManifoldTensor(point.to(dtype), manifold=self)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """A fixed point, the same for the same ``seed``: `random` with a generator of its own."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return self.random(*size, dtype=dtype, device=device, generator=generator)

    # -- what geoopt asks -----------------------------------------------------------------------

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        try:
            self._require_shape(shape)
        except ValueError as error:
            return False, f"`{name}`: {error}"
        return True, None

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        orthonormality, protection = self.constraint_error(x)
        if not orthonormality <= atol + rtol:  # the diagonal of xᵀx is compared with 1
            return False, f"max|xᵀx − I| = {orthonormality:.2e} exceeds {atol + rtol:.0e}"
        if not protection <= atol:
            return False, f"max|Fᵀx| = {protection:.2e} exceeds {atol:.0e}: x reaches into the protected subspace"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        residual = float(2 * sym(x.mT @ u).abs().max())
        if not residual <= atol + rtol * float(u.abs().max()):
            return False, f"max|xᵀu + uᵀx| = {residual:.2e} exceeds {atol:.0e}"
        leak = float((u - self._project_out(u)).abs().max())
        if not leak <= atol + rtol * float(u.abs().max()):
            return False, f"max|FFᵀu| = {leak:.2e} exceeds {atol:.0e}: u reaches into the protected subspace"
        return True, None

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"protected={self.k}, retraction={self.retraction.name!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RestrictedStiefel:
        before = self.complement
        super()._apply(fn, recurse)
        after = self.complement
        if before is not None and after is not None and after.dtype not in (torch.float32, torch.float64):
            # module.to(bfloat16) would leave FᵀF off by 3.5e-3: follow the device, keep the precision.
            self.complement = before.to(after.device) if before.device.type != "meta" else after.to(before.dtype)
        return self

    # -- inside ---------------------------------------------------------------------------------

    def _basis(self, like: Tensor) -> Tensor:
        assert self.complement is not None
        return self.complement.to(like.dtype)

    def _project_out(self, x: Tensor) -> Tensor:
        return project_out(x, self._basis(x)) if self.width else x

    def _step(self, x: Point, u: Tangent) -> Tangent:
        """The tangent part of u, less what of x itself has drifted into F: x + step lies off F."""
        step = self._project_out(x + u) - x if self.width else u
        return step - x @ sym(x.mT @ step)

    def _settled(self, y: Point) -> Point:
        return y if self.retraction.self_correcting else polar_near(y)

    def _require_room(self, n: int, p: int) -> None:
        free = n - self.k
        if free < p:
            raise ValueError(
                f"complement leaves {free} free directions in R^{n}, too few for rank {p}: "
                "lower the rank or the energy threshold"
            )

    def _require_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(f"a point is a matrix (…, n, p), got shape {tuple(shape)}")
        n, p = shape[-2:]
        if self.complement is not None and self.complement.shape[-2] != n:
            raise ValueError(f"points have {self.complement.shape[-2]} rows here, got shape {tuple(shape)}")
        self._require_room(n, p)


geoopt.Stiefel.register(RestrictedStiefel)  # isinstance and geoopt.utils.ismanifold answer True


def _orthonormal(complement: Tensor) -> Tensor:
    """The complement itself if orthonormal (zero columns aside), else an orthonormal basis of its columns."""
    check_basis(complement)
    wide = complement.detach().double()
    live = (wide.square().sum(-2) > 0).to(wide.dtype)  # zero columns are padding
    error = wide.mT @ wide - torch.diag_embed(live)
    if not complement.numel() or float(error.abs().max()) < 1e-6:  # what float32 QR leaves
        return complement.detach().clone()
    if not bool(live.bool().all()):
        raise ValueError("a zero-padded complement must be orthonormal in its other columns")
    q, r = torch.linalg.qr(wide)
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    if bool((size.amin(-1) <= 1e-7 * size.amax(-1)).any()):  # float32 data carries 7 digits
        raise ValueError(
            f"complement of shape {tuple(complement.shape)} has dependent columns: "
            "ProtectedSubspace.from_directions picks independent ones"
        )
    orthonormal: Tensor = q.to(complement.dtype).contiguous()
    return orthonormal


def kind_of(manifold: Any) -> str:
    """A plain-text name of the manifold, for parameter groups and records."""
    return str(getattr(manifold, "name", type(manifold).__name__))
