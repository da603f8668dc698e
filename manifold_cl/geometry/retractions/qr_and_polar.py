"""The QR and polar retractions: factorisations of x + u, each in a cheap and a robust form."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_cl.geometry.arguments import of_one_shape
from manifold_cl.geometry.long_steps import at_any_length
from manifold_cl.geometry.retractions.protocol import Order, orders
from manifold_cl.linalg import (
    LARGE,
    Point,
    Square,
    Tangent,
    cholesky_qr,
    gram_error,
    gram_size,
    identity_like,
    inverse_sqrt_deficit,
    log_orthogonal,
    matrix_exp,
    minus_product,
    normalise_by_cholesky,
    polar_factor,
    polar_near,
    project_out,
    signed_qr,
    skew,
    solve_sylvester,
    split_tangent,
)


class PolarRules:
    """The inverse and the differential of all forms of the polar retraction."""

    @of_one_shape
    def inverse(self, x: Point, y: Point) -> Tangent:
        """``y m − x`` with ``xᵀy m + m yᵀx = 2I``: one p × p Sylvester equation.

        Defined where all eigenvalues of xᵀy have positive real part, as at every point that the retraction reaches.
        """
        w = x.mT @ y
        return y @ solve_sylvester(w, w.mT, 2 * identity_like(w)) - x

    @of_one_shape
    def differential(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """``q s + (I − qqᵀ) v h⁻¹`` where x + u = q h and ``h s + s h = qᵀv − vᵀq``."""
        y = x + u
        e = gram_error(y)
        deficit = inverse_sqrt_deficit(e)
        q = y - y @ deficit
        h = identity_like(e) + e - deficit - e @ deficit  # (I + e)(I − D) = (I + e)^(1/2)
        spin = solve_sylvester(h, h, 2 * skew(q.mT @ v))
        return q @ spin + project_out(v - v @ deficit, q)


@dataclass(frozen=True)
class Polar(PolarRules):
    """The polar factor of x + u: the nearest point, second order for the Euclidean metric.

    Source: absil2008optimization, example 4.1.3; absil2012projection for the order.
    """

    name: str = "polar"
    order: Order = field(default_factory=orders(2, 1), hash=False)
    self_correcting: bool = True
    tangent_only: bool = True
    of_sum: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``(x + u)(I + uᵀu)^(-1/2)``, the polar factor of x + u, through the p × p Gram matrix.

        For u tangent at x the Gram matrix of x + u is I + uᵀu, with eigenvalues at least 1. O(n p²) + O(p³).
        """
        return polar_near(x + u)


@dataclass(frozen=True)
class PolarSVD(PolarRules):
    """`Polar` by a singular value decomposition: slower, and correct for every u that keeps full rank.

    The gradient is that of the polar factor; that of the decomposition fails at equal singular values.
    Source: absil2008optimization, example 4.1.3.
    """

    name: str = "polar_svd"
    order: Order = field(default_factory=orders(2, 1), hash=False)
    self_correcting: bool = True
    tangent_only: bool = False
    of_sum: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``a bᵀ`` from the thin decomposition x + u = a s bᵀ. O(n p²), with a large constant."""
        factor, _ = polar_factor(x + u)
        return minus_product(factor, factor, gram_error(factor) / 2)  # a float32 decomposition is off by 1e-6


class _QR:
    """The inverse and the differential of both forms of the QR retraction."""

    @of_one_shape
    def inverse(self, x: Point, y: Point) -> Tangent:
        """``y r − x`` with the upper triangular r that makes ``xᵀy r − I`` skew, column by column.

        Column j solves a j × j system with the leading block of xᵀy. Defined where all these blocks are regular
        and r comes out with a positive diagonal. O(n p²) + O(p⁴).
        """
        w = x.mT @ y
        columns: list[Tensor] = []
        for j in range(w.shape[-1]):
            earlier = [-(w[..., j : j + 1, :] @ c.unsqueeze(-1)).squeeze(-1) for c in columns]
            right = torch.cat([*earlier, torch.ones_like(w[..., 0, :1])], dim=-1)
            column = torch.linalg.solve(w[..., : j + 1, : j + 1], right)
            columns.append(torch.cat([column, column.new_zeros(*column.shape[:-1], w.shape[-1] - j - 1)], dim=-1))
        return y @ torch.stack(columns, dim=-1) - x

    @of_one_shape
    def differential(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """``q(l − lᵀ) + (I − qqᵀ) v r⁻¹`` where x + u = q r and l is the strictly lower part of ``qᵀv r⁻¹``."""
        y = x + u
        q = signed_qr(y)
        r = (q.mT @ y).triu()
        scaled: Tensor = torch.linalg.solve_triangular(r, v, upper=True, left=False)
        lower = (q.mT @ scaled).tril(-1)
        return q @ (lower - lower.mT) + project_out(scaled, q)


@dataclass(frozen=True)
class QR(_QR):
    """The orthonormal factor of x + u with fixed signs: first order, correct for every u that keeps full rank.

    Source: absil2008optimization, example 4.1.3.
    """

    name: str = "qr"
    order: Order = field(default_factory=orders(1, 1), hash=False)
    self_correcting: bool = True
    tangent_only: bool = False
    of_sum: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``qf(x + u)`` with a positive diagonal of the triangular factor. O(n p²), one factorisation per point."""
        return signed_qr(x + u)


@dataclass(frozen=True)
class CholeskyQR(_QR):
    """`QR` by the Cholesky factor of the Gram matrix I + uᵀu, without factorising a tall matrix.

    A large step is normalised twice. Source: sato2019cholesky.
    """

    name: str = "cholesky_qr"
    order: Order = field(default_factory=orders(1, 1), hash=False)
    self_correcting: bool = True
    tangent_only: bool = True
    of_sum: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``(x + u) l⁻ᵀ`` with ``l lᵀ = (x + u)ᵀ(x + u)``. O(n p²) + O(p³)."""
        y = x + u
        gram = y.mT @ y
        if gram_size(gram - identity_like(gram)) <= LARGE:
            return normalise_by_cholesky(y, gram)[0]
        return cholesky_qr(y.double())[0].to(y.dtype)


@dataclass(frozen=True)
class PolarLight:
    """The polar factor with the rotation inside span(x) followed exactly: second order, Euclidean metric.

    Source: jensen2026polar.
    """

    name: str = "polar_light"
    order: Order = field(default_factory=orders(2, 1), hash=False)
    self_correcting: bool = True
    tangent_only: bool = True

    @at_any_length
    def __call__(self, x: Point, u: Tangent) -> Point:
        """``(x eᴬ + b)(I + bᵀb)^(-1/2)`` with A = xᵀu and b = u − xA. O(n p²) + O(p³)."""
        a, b = split_tangent(x, u)
        return polar_near(x @ matrix_exp(a) + b)

    @of_one_shape
    def inverse(self, x: Point, y: Point) -> Tangent:
        """``x(log w − w) + y h⁻¹`` where xᵀy = w h is the polar decomposition; angles in w below π."""
        left, sigma, right = torch.linalg.svd(x.mT @ y)
        w: Square = left @ right
        h_inverse: Square = (right.mT / sigma.unsqueeze(-2)) @ right
        return x @ (log_orthogonal(w) - w) + y @ h_inverse
