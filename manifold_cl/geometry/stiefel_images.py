"""Scaled and generalized Stiefel manifolds: images of the restricted Stiefel manifold under a linear map.

A linear map T takes the *frames* y, with ``yᵀy = I``, to the points ``x = T y``. The metric here is the one that makes
T an isometry, times a constant c. Every verb is then that of `RestrictedStiefel` at y, and nothing is derived twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import geoopt
import numpy as np
import torch
from torch import Tensor

from manifold_cl.geometry.arguments import (
    Outline,
    broadcast_batches,
    shape_fault,
    validate_arguments,
    validate_positive_definite,
)
from manifold_cl.geometry.metrics import MetricChoice
from manifold_cl.geometry.points import ConstraintResiduals, DerivedVerbs, require_dtype
from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel
from manifold_cl.geometry.retractions import Retraction
from manifold_cl.geometry.subspace import Array, ProtectedSubspace
from manifold_cl.linalg import Point, Tangent, full_precision

Rule = Retraction | str | Callable[[Tensor, Tensor], Tensor] | None


class StiefelImage(DerivedVerbs):
    """The points ``T y`` for y on `frames`; a subclass defines the linear map T and the constant c of the metric.

    Verbs have the contracts of `RestrictedStiefel`; tangent vectors are those of this manifold.
    """

    ndim = 2
    reversible = False
    frames: RestrictedStiefel
    __scaling__ = RestrictedStiefel.__scaling__.copy()

    def to_frames(self, x: Tensor) -> Tensor:
        """``T⁻¹ x``: the frames of points, or tangent vectors at the frames."""
        raise NotImplementedError

    def from_frames(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """``T y``: points of frames, or tangent vectors at the points."""
        raise NotImplementedError

    def _lower(self, g: Tensor) -> Tensor:
        """``Tᵀ g / c``: the gradient in y of a function with gradient g in x, over the metric's constant."""
        raise NotImplementedError

    def _constant(self, like: Tensor) -> Tensor:
        """The constant c of the metric (…, 1, 1)."""
        return like.new_ones(1, 1)

    @property
    def _outline(self) -> Outline:
        """The shape of the points, as far as this manifold determines it."""
        return self.frames._outline

    @property
    def complement(self) -> Tensor | None:
        """The protected directions F (n, k), with ``Fᵀx = 0``."""
        return self.frames.complement

    @property
    def k(self) -> int:
        """Number of protected directions."""
        return self.frames.k

    def dim(self, n: int, p: int) -> int:
        """``(n − k)p − p(p + 1)/2``, the dimension of the manifold of n × p points."""
        rows, _, source = self._outline
        if rows not in (None, n):
            raise ValueError(f"n is the number of rows of {source}, {rows}, got n={n}")
        return self.frames.dim(n, p)

    def capacity(self, p: int, n: int | None = None) -> int:
        """Number of further directions that can be protected while n × p points exist; n is needed if F is None."""
        return self.frames.capacity(p, n)

    def constraint_error(self, x: Point) -> ConstraintResiduals:
        """Largest entries of ``yᵀy − I`` and, relative to the longest column of x, of ``Fᵀx``. In float64."""
        validate_arguments(self._outline, x=x)
        x = x.detach().double()
        orthonormality = self.frames.constraint_error(self.to_frames(x)).orthonormality
        if self.complement is None or not x.numel():
            return ConstraintResiduals(orthonormality, 0.0)
        longest = torch.linalg.vector_norm(x, dim=-2).amax()
        return ConstraintResiduals(orthonormality, float((self.complement.to(x).mT @ x).abs().amax() / longest))

    def projx(self, x: Point) -> Point:
        """The nearest point in this metric; ValueError where none exists."""
        validate_arguments(self._outline, x=x)
        require_dtype(x)
        with full_precision(x.device):
            return self.from_frames(self.frames.projx(self.to_frames(x)), x.dtype)

    def proju(self, x: Point, u: Tangent) -> Tangent:
        """The projection of u onto the tangent space at x, orthogonal in this metric."""
        validate_arguments(self._outline, x=x, u=u)
        require_dtype(x)
        with full_precision(x.device):
            return self.from_frames(self.frames.proju(self.to_frames(x), self.to_frames(u)), x.dtype)

    def egrad2rgrad(self, x: Point, u: Tangent) -> Tangent:
        """The Riemannian gradient of the Euclidean gradient u, in this metric."""
        validate_arguments(self._outline, x=x, u=u)
        require_dtype(x)
        with full_precision(x.device):
            return self.from_frames(self.frames.egrad2rgrad(self.to_frames(x), self._lower(u)), x.dtype)

    def ehess2rhess(self, x: Point, g: Tangent, h: Tangent, u: Tangent) -> Tangent:
        """The Riemannian Hessian along the tangent vector u, in this metric.

        ``g`` is the Euclidean gradient at x, ``h`` the Euclidean Hessian along u.
        """
        validate_arguments(self._outline, x=x, g=g, h=h, u=u)
        require_dtype(x)
        with full_precision(x.device):
            y, slope, bend = self.to_frames(x), self._lower(g), self._lower(h)
            return self.from_frames(self.frames.ehess2rhess(y, slope, bend, self.to_frames(u)), x.dtype)

    def inner(self, x: Point, u: Tangent, v: Tangent | None = None, *, keepdim: bool = False) -> Tensor:
        """The metric's inner product, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        validate_arguments(self._outline, one_dtype=False, x=x, u=u, v=u if v is None else v)
        with full_precision(x.device):
            y, first = self.to_frames(x), self.to_frames(u)
            product = self.frames.inner(y, first, None if v is None else self.to_frames(v), keepdim=True)
            product = (self._constant(product) * product).to(x.dtype)
        return product if keepdim else product[..., 0, 0]

    def dist(self, x: Point, y: Point, *, keepdim: bool = False) -> Tensor:
        """Length of the shortest geodesic from x to y, within the radius of `logmap`. Differentiable."""
        validate_arguments(self._outline, one_dtype=False, x=x, y=y)
        with full_precision(x.device):
            length = self.frames.dist(self.to_frames(x), self.to_frames(y), keepdim=True)
            length = (self._constant(length).sqrt() * length).to(x.dtype)
        return length if keepdim else length[..., 0, 0]

    def logmap(self, x: Point, y: Point) -> Tangent:
        """The tangent vector at x of the shortest geodesic to y; ValueError where that is not certain."""
        validate_arguments(self._outline, one_dtype=False, x=x, y=y)
        return self.from_frames(self.frames.logmap(self.to_frames(x), self.to_frames(y)), x.dtype)

    def retr(self, x: Point, u: Tangent) -> Point:
        """The retraction of u at x; only the tangent part of u counts."""
        validate_arguments(self._outline, x=x, u=u)
        require_dtype(x)
        with full_precision(x.device):
            return self.from_frames(self.frames.retr(self.to_frames(x), self.to_frames(u)), x.dtype)

    def inverse_retr(self, x: Point, y: Point) -> Tangent:
        """The tangent vector u with ``retr(x, u) = y``; ValueError where there is no closed form."""
        validate_arguments(self._outline, one_dtype=False, x=x, y=y)
        return self.from_frames(self.frames.inverse_retr(self.to_frames(x), self.to_frames(y)), x.dtype)

    def expmap(self, x: Point, u: Tangent) -> Point:
        """The point at time 1 of this metric's geodesic from x with velocity u (tangent part)."""
        validate_arguments(self._outline, x=x, u=u)
        require_dtype(x)
        with full_precision(x.device):
            return self.from_frames(self.frames.expmap(self.to_frames(x), self.to_frames(u)), x.dtype)

    def transp(self, x: Point, y: Point, v: Tangent) -> Tangent:
        """The projection of v, tangent at x, onto the tangent space at y."""
        validate_arguments(self._outline, y=y, v=v)
        return self.proju(y, v)

    def retr_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``retr(x, u)`` and v carried there by this manifold's transport."""
        validate_arguments(self._outline, x=x, u=u)
        validate_arguments(self._outline, one_dtype=False, x=x, v=v)
        require_dtype(x)
        with full_precision(x.device):
            y, w = self.frames.retr_transp(self.to_frames(x), self.to_frames(u), self.to_frames(v))
            return self.from_frames(y, x.dtype), self.from_frames(w, x.dtype)

    def expmap_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``expmap(x, u)`` and v carried there: parallel if that is this manifold's transport, else projected."""
        validate_arguments(self._outline, x=x, u=u)
        validate_arguments(self._outline, one_dtype=False, x=x, v=v)
        require_dtype(x)
        with full_precision(x.device):
            y, w = self.frames.expmap_transp(self.to_frames(x), self.to_frames(u), self.to_frames(v))
            return self.from_frames(y, x.dtype), self.from_frames(w, x.dtype)

    def random(
        self,
        *size: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> geoopt.ManifoldTensor:
        """A point ``T y`` of a uniform y, of shape ``size`` = (…, n, p), given as numbers or one tuple."""
        y = self.frames.random(*size, dtype=torch.float64, device=device, generator=generator).as_subclass(Tensor)
        x = self.from_frames(y, dtype or torch.get_default_dtype())
        return geoopt.ManifoldTensor(x.contiguous(), manifold=self)

    random_naive = random  # the name of geoopt's Stiefel manifolds

    def extra_repr(self) -> str:
        """The options that the printed module shows."""
        return self.frames.extra_repr()

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        return self.frames._check_shape(shape, name)

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        if x.dtype not in (torch.float32, torch.float64):
            return False, f"a point is kept in float32 or float64, got {x.dtype}"
        orthonormality, protection = self.constraint_error(x)
        if not orthonormality <= atol + rtol:
            return False, f"the constraint is violated by {orthonormality:.2e}, more than {atol + rtol:.0e}"
        if not protection <= atol:
            return False, f"max|Fᵀx| = {protection:.2e} of a column's length exceeds {atol:.0e}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if (fault := shape_fault(self._outline, {"x": x, "u": u})) is not None:
            return False, fault
        return self.frames._check_vector_on_tangent(self.to_frames(x), self.to_frames(u), atol=atol, rtol=rtol)


class ScaledStiefel(StiefelImage):
    """``{x : xᵀx = s² I, Fᵀx = 0}`` with the metric of `RestrictedStiefel`, inherited from the matrices.

    Args:
        scale: s > 0, a number, or a tensor (…) with one per point of a batch.
        complement: as in `RestrictedStiefel`.
        retraction: as in `RestrictedStiefel`, of the frames ``x / s``.
        metric: ``"euclidean"``, tr(uᵀv), or ``"canonical"``, tr(uᵀ(I − xxᵀ/2s²)v); or a `BetaMetric`.
        transport: as in `RestrictedStiefel`.

    Raises:
        ValueError: for a scale that is not positive and finite, and as `RestrictedStiefel`.
    """

    name = "ScaledStiefel"
    scale: Tensor

    def __init__(
        self,
        scale: float | Tensor,
        complement: Tensor | ProtectedSubspace | Array | None = None,
        *,
        retraction: Rule = None,
        metric: MetricChoice = "euclidean",
        transport: str | None = None,
    ) -> None:
        super().__init__()
        value = torch.as_tensor(scale, dtype=torch.float64).detach().clone()
        if not bool((value.isfinite() & (value > 0)).all()):
            raise ValueError(f"a scale is positive and finite, got {float(value.min())}")
        self.register_buffer("scale", value[..., None, None])
        self.frames = RestrictedStiefel(complement, retraction=retraction, metric=metric, transport=transport)
        frames, batch = tuple(self.frames._outline.batch), tuple(value.shape)
        if any(a != b and 1 not in (a, b) for a, b in zip(frames[::-1], batch[::-1], strict=False)):
            raise ValueError(f"the scales are a batch {batch}, the complements a batch {frames}: they must broadcast")
        self.reversible = self.frames.reversible

    def extra_repr(self) -> str:
        """The options that the printed module shows."""
        return f"scale={self.scale.flatten().tolist()}, {self.frames.extra_repr()}"

    @property
    def _outline(self) -> Outline:
        frames, batch = self.frames._outline, tuple(self.scale.shape[:-2])
        if not batch:
            return frames
        return Outline(frames.rows, broadcast_batches(frames.batch, batch), "the scale or the complement")

    def to_frames(self, x: Tensor) -> Tensor:
        """``x / s``."""
        return x / self.scale.to(x.dtype)

    def from_frames(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """``s y``."""
        return (y * self.scale.to(y.dtype)).to(dtype)

    def _lower(self, g: Tensor) -> Tensor:
        return g / self.scale.to(g.dtype)  # Tᵀ g / c = s g / s²

    def _constant(self, like: Tensor) -> Tensor:
        return self.scale.to(like.dtype).square()

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        batch, points = tuple(self.scale.shape[:-2]), shape[:-2]
        sides = zip(batch[::-1], points[::-1], strict=False)
        if len(points) < len(batch) or any(b not in (1, size) for b, size in sides):
            return False, f"`{name}`: the scales are a batch {batch}, got points of shape {tuple(shape)}"
        return super()._check_shape(shape, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledStiefel:
        before = self.scale
        super()._apply(fn, recurse)
        self.scale = before.to(self.scale.device)  # the device changes, the precision stays
        return self


class GeneralizedStiefel(StiefelImage):
    """``{x : xᵀBx = I, Fᵀx = 0}`` for a positive definite B, with the metric tr(uᵀBv).

    With ``B = L Lᵀ``, the map ``x = L⁻ᵀ y`` is an isometry from the frames y with ``(L⁻¹F)ᵀ y = 0``. Conversions and
    steps run in float64, and results are rounded to the dtype of x. O(n² p) per verb, beside that of the frames.

    Source: vary2024optimization for the manifold; the restricted form is ours.

    Args:
        b: B (n, n), symmetric and positive definite: a tensor or an array. It is copied, in float64.
        complement: the directions F that points are orthogonal to, in the ordinary inner product: with x as the input
            side of an update, inputs in span(F) have no effect. For ``(BF)ᵀx = 0`` pass ``b @ F``.
        retraction: as in `RestrictedStiefel`, of the frames. Polar, QR and the others are those of the B inner product.
        metric: ``"euclidean"``, tr(uᵀBv), or ``"canonical"``, tr(uᵀ(B − Bxxᵀ B/2)v); or a `BetaMetric`.
        transport: as in `RestrictedStiefel`.

    Raises:
        ValueError: for a B that is not square, symmetric and positive definite (the message gives its smallest
            eigenvalue), and as `RestrictedStiefel`.
    """

    name = "GeneralizedStiefel"
    b: Tensor
    lower: Tensor
    protected: Tensor | None

    def __init__(
        self,
        b: Tensor | Array,
        complement: Tensor | ProtectedSubspace | Array | None = None,
        *,
        retraction: Rule = None,
        metric: MetricChoice = "euclidean",
        transport: str | None = None,
    ) -> None:
        super().__init__()
        given_b = torch.as_tensor(np.ascontiguousarray(b) if isinstance(b, np.ndarray) else b).detach().double()
        validate_positive_definite(given_b)
        self.register_buffer("b", (given_b + given_b.mT) / 2)
        given = RestrictedStiefel(complement).complement  # validated, and orthonormal
        if given is not None and given.shape[-2] != len(self.b):
            raise ValueError(f"B has {len(self.b)} rows, the complement {given.shape[-2]}")
        if given is not None and given.ndim == 2:
            given = given[:, (given != 0).any(dim=0)]  # zero columns are padding
        self.register_buffer("protected", given)
        self.register_buffer("lower", torch.linalg.cholesky(self.b), persistent=False)
        image = None if given is None else torch.linalg.solve_triangular(self.lower, given.double(), upper=False)
        self.frames = RestrictedStiefel(image, retraction=retraction, metric=metric, transport=transport)
        self.reversible = self.frames.reversible

    @property
    def complement(self) -> Tensor | None:
        """The protected directions F (n, k), with ``Fᵀx = 0``."""
        return self.protected

    @property
    def _outline(self) -> Outline:
        return Outline(len(self.b), self.frames._outline.batch, "B")

    def to_frames(self, x: Tensor) -> Tensor:
        """``Lᵀ x``, in float64."""
        return self.lower.mT @ x.double()

    def from_frames(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """``L⁻ᵀ y``, rounded to ``dtype``."""
        x: Tensor = torch.linalg.solve_triangular(self.lower.mT, y, upper=True)
        return x.to(dtype)

    def _lower(self, g: Tensor) -> Tensor:
        lowered: Tensor = torch.linalg.solve_triangular(self.lower, g.double(), upper=False)
        return lowered

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        if len(shape) > 1 and shape[-2] != len(self.b):
            return False, f"`{name}`: B has {len(self.b)} rows, got points of shape {tuple(shape)}"
        return super()._check_shape(shape, name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.lower = torch.linalg.cholesky(self.b)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GeneralizedStiefel:
        b, lower, protected, frames = self.b, self.lower, self.protected, self.frames.complement
        super()._apply(fn, recurse)
        device = self.b.device  # the device changes, the precision stays
        self.b, self.lower = b.to(device), lower.to(device)
        self.protected = None if protected is None else protected.to(device)
        self.frames.complement = None if frames is None else frames.to(device)
        return self
