"""The points of the restricted Stiefel manifold: validation, residuals, projections, random points.

Independent of metric and retraction, which `RestrictedStiefel` adds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import geoopt
import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor

from manifold_cl.geometry.arguments import ANY, Outline, shape_fault, validate_arguments
from manifold_cl.geometry.compact_bases import unpack
from manifold_cl.geometry.subspace import Array, ProtectedSubspace, as_basis, orthonormal_columns
from manifold_cl.linalg import (
    NEAR,
    Point,
    Tangent,
    full_precision,
    gram_error,
    minus_product,
    polar_factor,
    polar_far,
    polar_near,
    project_out,
    read_largest,
    signed_qr,
    sym,
)
from manifold_cl.rules import validate_whole

LARGEST = 1e15
"""Largest entry before a projection; larger matrices are scaled, so that sums of squares stay finite in float32."""
ON_MANIFOLD = 1e-4
"""Largest constraint residual of a point that is refined in float64; float32 training stays below 2e-6."""
DTYPES = (torch.float32, torch.float64)


def require_dtype(x: Tensor) -> None:
    """Refuse half precision, integers and complex numbers, without reading values."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"points are real and kept in float32 or float64, got {x.dtype}: rounding in half precision alone costs "
            "1e-3 of orthonormality; convert with x.float()"
        )


def require_finite(x: Tensor) -> None:
    """Refuse NaN and infinities; reads the values."""
    if not bool(x.isfinite().all()):
        raise ValueError(f"a point of shape {tuple(x.shape)} holds NaN or infinite values")


class ConstraintResiduals(NamedTuple):
    """The distance of a point from the manifold: the largest entries of xᵀx − I and of Fᵀx."""

    orthonormality: float
    protection: float

    def __str__(self) -> str:
        return f"orthonormality {self.orthonormality:.1e}, protection {self.protection:.1e}"


def _shape(size: Sequence[int | Sequence[int]]) -> tuple[int, ...]:
    """The shape, from integers or one sequence of them; TypeError for anything else, ValueError below 0."""
    given: Any = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    try:
        shape = tuple(operator.index(side) for side in given)
    except TypeError:
        raise TypeError(f"a size is integers, or one tuple of them, got {size!r}: for example random(20, 3)") from None
    if any(side < 0 for side in shape):
        raise ValueError(f"a size is integers of at least 0, got {shape}: for example random(20, 3)")
    return shape


class DerivedVerbs(Manifold):  # type: ignore[misc]  # geoopt is not typed
    """The verbs that follow from others, for every manifold here."""

    def transp_follow_retr(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """Vector v carried along the retraction curve of u."""
        carried: Tensor = self.retr_transp(x, u, v)[1]
        return carried

    def transp_follow_expmap(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """Vector v carried along the geodesic of u."""
        carried: Tensor = self.expmap_transp(x, u, v)[1]
        return carried

    def origin(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """A fixed point per ``seed``: `random` with its own generator; another point at each call for None."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        return self.random(*size, dtype=dtype, device=device, generator=generator)


class RestrictedPoints(DerivedVerbs):
    """The matrices with ``xᵀx = I`` and ``Fᵀx = 0``, and their tangent spaces."""

    ndim = 2
    complement: Tensor | None
    packed: Tensor | None

    def __init__(self, complement: Tensor | ProtectedSubspace | Array | None = None) -> None:
        super().__init__()
        packed = complement.packed if isinstance(complement, ProtectedSubspace) else None
        if isinstance(complement, ProtectedSubspace):
            complement = complement.basis
        elif complement is not None:
            complement = orthonormal_columns(as_basis(complement))
        self.register_buffer("complement", complement)
        self.register_buffer("packed", packed)

    def packed_complement(self) -> Tensor | None:
        """The packed columns that define the complement (`ProtectedSubspace.compacted`); None where none do."""
        if self.packed is None or self.complement is None or self.complement.device.type == "meta":
            return None
        defined = unpack(self.packed, self.complement.shape[-2]).to(self.complement.device)
        return self.packed if torch.equal(defined, self.complement) else None  # one that was replaced is another one

    @property
    def width(self) -> int:
        """Columns of the complement, zero padding included."""
        return 0 if self.complement is None else self.complement.shape[-1]

    @property
    def k(self) -> int:
        """Number of protected directions: columns that are not zero; the largest number in a batch."""
        if self.complement is None or not self.width or self.complement.device.type == "meta":
            return self.width  # a meta tensor has no values to read
        return int((self.complement != 0).any(dim=-2).sum(-1).max())

    @property
    def _outline(self) -> Outline:
        """The shape of the points, as far as the complement determines it."""
        basis = self.complement
        return ANY if basis is None else Outline(basis.shape[-2], basis.shape[:-2])

    def dim(self, n: int, p: int) -> int:
        """``(n − k)p − p(p + 1)/2``, the dimension of the manifold of n × p points."""
        validate_whole("n", n, least=0)
        validate_whole("p", p, least=0)
        self._require_rows(n)
        self.require_room(n, p)
        return (n - self.k) * p - p * (p + 1) // 2

    def capacity(self, p: int, n: int | None = None) -> int:
        """Number of further directions that can be protected while n × p points exist; n is needed if F is None."""
        if n is None:
            if self.complement is None:
                raise ValueError("nothing is protected, so the number of rows is unknown: pass n=")
            n = self.complement.shape[-2]
        validate_whole("p", p, least=0)
        self._require_rows(n)
        return max(n - self.k - p, 0)

    def constraint_error(self, x: Point) -> ConstraintResiduals:
        """Largest absolute entries of ``xᵀx − I`` and of ``Fᵀx``, measured in float64."""
        validate_arguments(self._outline, x=x)
        x = x.detach().double()
        leak = self._basis(x).mT @ x if self.width else x.new_zeros(1)
        return ConstraintResiduals(*(float(e.abs().max()) if e.numel() else 0.0 for e in (gram_error(x), leak)))

    def projx(self, x: Point) -> Point:
        """The nearest point: the polar factor of ``P x``. Matrix products near the manifold, an SVD far from it.

        Under ``torch.compile`` and ``torch.func.vmap`` no value can be read: the result is then NaN where no nearest
        point exists, and where the condition of P x is above 1e7.

        Raises:
            ValueError: when P x has no p independent columns, so no nearest point exists.
        """
        validate_arguments(self._outline, x=x)
        require_dtype(x)
        with full_precision(x.device):
            x = x / (torch.linalg.vector_norm(x.detach(), math.inf) / LARGEST).clamp_min(1) if x.numel() else x
            y = self._project_out(x)
            size = read_largest(torch.linalg.matrix_norm(gram_error(y).detach()))
            if size is None:
                return self._project_out(polar_far(self._project_out(y)))
            if size < NEAR:
                return self._project_out(polar_near(y))
            require_finite(x)
            nearest, sigma = polar_factor(self._project_out(y))
            # Relative to x itself: for x inside F, P x is rounding, which may have any rank.
            floor = torch.linalg.matrix_norm(x) * x.shape[-2] * torch.finfo(x.dtype).eps
            if bool((sigma[..., -1] <= floor).any()):
                raise ValueError(
                    f"no nearest point: outside the protected subspace x has rank below {x.shape[-1]} "
                    f"(singular values from {float(sigma.max()):.1e} to {float(sigma.min()):.1e})"
                )
            return self._project_out(nearest)

    def proju(self, x: Point, u: Tangent) -> Tangent:
        """``P (u − x sym(xᵀu))``, the orthogonal projection onto the tangent space at x. O(n p (k + p)).

        Idempotent, self-adjoint, the identity on tangent vectors (docs/geometry.md, "Projection and gradients").
        """
        validate_arguments(self._outline, x=x, u=u)
        require_dtype(x)
        with full_precision(x.device):
            return self._tangent(x, u)

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> geoopt.ManifoldTensor:
        """A point from the uniform (Haar) distribution, of shape ``size`` = (…, n, p), given as numbers or one tuple.

        The orthonormal QR factor, with positive diagonal, of a Gaussian matrix projected off F.
        """
        shape = _shape(size)
        self._require_shape(shape)
        basis = self.complement
        device = device if device is not None else (None if basis is None else basis.device)
        dtype = dtype or (torch.get_default_dtype() if basis is None else basis.dtype)
        source = generator.device if generator is not None else device
        draw = torch.randn(shape, dtype=torch.float64, device=source, generator=generator).to(device)
        factor = signed_qr(self._project_out(self._project_out(draw)))
        # Of a nearly dependent draw, or one nearly inside F, this factor magnifies rounding errors: once more.
        point = signed_qr(self._project_out(factor)).to(dtype)
        return geoopt.ManifoldTensor(point.contiguous(), manifold=self)  # a factorisation returns column-major memory

    random_naive = random  # the name of geoopt's Stiefel manifolds

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        try:
            self._require_shape(shape)
        except ValueError as error:
            return False, f"`{name}`: {error}"
        return True, None

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        if x.dtype not in DTYPES:
            return False, f"a point is kept in float32 or float64, got {x.dtype}"
        orthonormality, protection = self.constraint_error(x)
        if not orthonormality <= atol + rtol:  # the diagonal of xᵀx is compared with 1
            return False, f"max|xᵀx − I| = {orthonormality:.2e} exceeds {atol + rtol:.0e}"
        if not protection <= atol:
            return False, f"max|Fᵀx| = {protection:.2e} exceeds {atol:.0e}: x reaches into the protected subspace"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if (fault := shape_fault(self._outline, {"x": x, "u": u})) is not None:
            return False, fault
        bound = atol + rtol * float(u.abs().max())
        residual = float(2 * sym(x.mT @ u).abs().max())
        if not residual <= bound:
            return False, f"max|xᵀu + uᵀx| = {residual:.2e} exceeds {atol:.0e}"
        leak = float((u - self._project_out(u)).abs().max())
        if not leak <= bound:
            return False, f"max|FFᵀu| = {leak:.2e} exceeds {atol:.0e}: u reaches into the protected subspace"
        return True, None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}complement" in state_dict and self.complement is not None:
            self.complement = self.complement.clone()  # loading writes in place, and layers share the tensor
            # Columns of a state replace those that are here, and a state without them has a basis without them.
            columns = state_dict.get(f"{prefix}packed")
            self.packed = None if columns is None else torch.empty_like(columns, device=self.complement.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RestrictedPoints:
        before = self.complement
        super()._apply(fn, recurse)
        after = self.complement
        if before is not None and after is not None and after.dtype not in DTYPES:
            # In bfloat16 FᵀF would be off by 3.5e-3: change the device, keep the precision.
            self.complement = before.to(after.device) if before.device.type != "meta" else after.to(before.dtype)
        return self

    def _basis(self, like: Tensor) -> Tensor:
        assert self.complement is not None
        return self.complement.to(like.dtype)

    def _project_out(self, x: Tensor) -> Tensor:
        return project_out(x, self._basis(x)) if self.width else x

    def _tangent(self, x: Point, u: Tangent) -> Tangent:
        """``P (u − x sym(xᵀu))``. P comes last, since the product reintroduces the leak of a drifted x."""
        return self._project_out(minus_product(u, x, sym(x.mT @ u)))

    def _refined(self, *points: Point) -> Iterator[Point]:
        """The points in float64 without their rounding errors; ValueError for a matrix off the manifold."""
        for x in points:
            require_dtype(x)
            require_finite(x)
            self._require_shape(tuple(x.shape))
            ok, reason = self._check_point_on_manifold(x, atol=ON_MANIFOLD, rtol=0.0)
            if not ok:
                raise ValueError(f"a point off the manifold: {reason}; project it with projx")
        wide = (self._project_out(x.double()) for x in points)
        return iter(torch.broadcast_tensors(*(polar_near(x) for x in wide)))  # type: ignore[no-untyped-call]

    def require_room(self, n: int, p: int) -> None:
        """Raise ValueError, with the number of free directions, where there are no points of n × p."""
        free = n - self.k
        if free < p:
            raise ValueError(
                f"complement leaves {free} free directions in R^{n}, too few for rank {p}: "
                "lower the rank or the energy threshold"
            )

    def _require_rows(self, n: int) -> None:
        if self.complement is not None and self.complement.shape[-2] != n:
            raise ValueError(f"n is the number of rows of the complement, {self.complement.shape[-2]}, got n={n}")

    def _require_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(f"a point is a matrix (…, n, p), got shape {tuple(shape)}")
        n, p = shape[-2:]
        if self.complement is not None and self.complement.shape[-2] != n:
            raise ValueError(f"points have {self.complement.shape[-2]} rows here, got shape {tuple(shape)}")
        if self.complement is not None and self.complement.ndim > 2:
            batch, points = tuple(self.complement.shape[:-2]), tuple(shape[:-2])
            sides = zip(batch[::-1], points[::-1], strict=False)
            if len(points) < len(batch) or any(b not in (1, size) for b, size in sides):
                raise ValueError(f"the complements are a batch {batch}, got points of shape {tuple(shape)}")
        self.require_room(n, p)
