"""Steepest tangent directions: linear minimization oracles of norms on the tangent spaces of a Stiefel manifold.

Under the spectral norm the problem has a closed solution, in matrices of 2p × 2p. Complete a tangent vector ``A = x Ω +
Q K`` (Ω skew, Q an orthonormal basis of what the gradient has outside x) to the skew matrix ``Z = [[Ω, −Kᵀ], [K, Ψ]]``.
A suitable Ψ keeps its spectral norm at that of A (davis1982norm), and Ψ does not enter the objective. So A is the first
block column of the solution over *all* skew matrices, which is a polar factor (docs/decisions, "The exact spectral
direction is a polar factor").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_cl.linalg import Basis, Point, Square, Tangent, full_precision, gram, skew, sym

Total = Callable[[Tensor], Tensor]
"""Sums a block of products of columns over the ranks that hold rows."""
SMALL = 64
"""Units of rounding, relative to the largest, below which a direction of a gradient counts as absent."""


def _itself(block: Tensor) -> Tensor:
    return block


class SteepestDirection(NamedTuple):
    """The solution of `tangent_lmo`, and how exact it is.

    Args:
        direction: A (…, n, p).
        value: ``⟨g, A⟩`` (…): the dual norm of g on the tangent space.
        gap: relative duality gap (…), at least 0 up to rounding: no tangent vector of norm 1 has more than
            ``(1 + gap) value``.
        tangency: largest entry of ``xᵀA + Aᵀx`` (…).
    """

    direction: Tangent
    value: Tensor
    gap: Tensor
    tangency: Tensor


def tangent_lmo(
    x: Point, g: Tensor, *, norm: str = "spectral", complement: Basis | None = None, total: Total = _itself
) -> SteepestDirection:
    """The tangent vector A at x with ``|A| ≤ 1`` that maximises ``⟨g, A⟩``; steps go along −A.

    Zero for g = 0 and for a g in F.

    Args:
        x: points (…, n, p) with orthonormal columns.
        g: gradients, Euclidean or Riemannian, of the same shape.
        norm: ``"spectral"``, the largest singular value: exact, in closed form. ``"frobenius"``: the normalised
            Riemannian gradient. ``"blocks"``: the larger spectral norm of the part inside span(x) and the part outside
            (li2026imuon), between ``1/√2`` and 1 times the spectral norm.
        complement: orthonormal F (…, n, k) with ``Fᵀx = 0``; ``FᵀA = 0`` then.
        total: where rows of x, g and F are spread over ranks, sums a p × p or k × p block over them.

    Raises:
        ValueError: for an unknown norm, or shapes that differ.

    Source: bernstein2025modular poses the spectral problem; the closed form is ours. O(n p (k + p)) + O(p³).
    """
    if norm not in NORMS:
        raise ValueError(f"norm is one of {', '.join(NORMS)}, got {norm!r}")
    if x.shape != g.shape:
        raise ValueError(f"x and g have one shape (…, n, p), got {tuple(x.shape)} and {tuple(g.shape)}")
    if complement is not None and (complement.ndim < 2 or complement.shape[-2] != x.shape[-2]):
        raise ValueError(f"the complement is (…, {x.shape[-2]}, k), rows as x has, got shape {tuple(complement.shape)}")
    with full_precision(x.device):
        size = given = _length(g, total)
        if complement is not None:
            g = g - complement @ total(complement.mT @ g)
            size = _length(g, total)
        size = torch.where(size > _rounding(g) * given, size, 0)  # of a gradient inside F only rounding is left
        unit = torch.where(size > 0, g, 0) / torch.where(size > 0, size, 1)
        direction, bound = NORMS[norm](x, unit, total)
        if complement is not None:
            direction = direction - complement @ total(complement.mT @ direction)
        value = total((unit * direction).sum(dim=(-2, -1)))
        gap = (bound - value) / value.clamp_min(_rounding(g))
        inside = total(x.mT @ direction)
        return SteepestDirection(direction, value * size[..., 0, 0], gap, (inside + inside.mT).abs().amax(dim=(-2, -1)))


def spectral(x: Point, g: Tensor, total: Total) -> tuple[Tangent, Tensor]:
    """The direction for the spectral norm, and the bound that it attains."""
    inside, basis, rest = split(x, g, total)
    turn, lift, bound = spectral_blocks(skew(inside), rest, least=_rounding(g))
    return x @ turn.to(x.dtype) + basis @ lift.to(x.dtype), bound.to(x.dtype)


def spectral_blocks(turn: Square, rest: Square, *, least: float = 0.0) -> tuple[Square, Square, Tensor]:
    """``(Ω, K)`` and the optimum, for a gradient with skew part ``turn`` inside x and ``rest`` (q, p) outside.

    The first block column of the polar factor of ``[[turn, −restᵀ/2], [rest/2, 0]]``, 0 on the null directions of this
    matrix and on singular values up to ``least``.
    """
    q, p = rest.shape[-2:]
    corner = rest.new_zeros(*rest.shape[:-2], q, q)
    top, bottom = torch.cat([turn, -rest.mT / 2], dim=-1), torch.cat([rest / 2, corner], dim=-1)
    factor, optimum = _polar(torch.cat([top, bottom], dim=-2), least=least)
    return skew(factor[..., :p, :p]), factor[..., p:, :p], optimum


def frobenius(x: Point, g: Tensor, total: Total) -> tuple[Tangent, Tensor]:
    """The Riemannian gradient of the Euclidean metric, normalised, and its length."""
    tangent = g - x @ sym(total(x.mT @ g))
    length = _length(tangent, total)
    length = torch.where(length > _rounding(g), length, 0)  # of a normal gradient only rounding is left
    direction = torch.where(length > 0, tangent, 0) / torch.where(length > 0, length, 1)
    return direction - x @ sym(total(x.mT @ direction)), length[..., 0, 0]  # the division magnifies rounding


def blocks(x: Point, g: Tensor, total: Total) -> tuple[Tangent, Tensor]:
    """The two parts of a tangent vector, each steepest under its own spectral norm; nuclear norms as the bound."""
    inside, basis, rest = split(x, g, total)
    turn, first = _polar(skew(inside), least=_rounding(g))
    lift, second = _polar(rest, least=_rounding(g))
    return x @ skew(turn).to(x.dtype) + basis @ lift.to(x.dtype), (first + second).to(x.dtype)


def msign(m: Tensor, *, total: Total = _itself) -> Tensor:
    """The polar factor of m (…, n, p), whose singular values are 1, and 0 where those of m are. O(n p²).

    ``total``: as in `tangent_lmo`.
    """
    basis = _orthonormal(m, total)
    factor, _ = _polar(total(gram(basis, m)).double())
    return basis @ factor.to(m.dtype)


def split(x: Point, g: Tensor, total: Total) -> tuple[Square, Tensor, Square]:
    """``(S, Q, R)`` with ``g = x S + Q R`` for g of length 1: Q (n, p) has orthonormal or zero columns off x.

    Zero columns stand for rounding: Q is zero where no direction is off x, as for square points. S and R in float64.
    """
    first = total(x.mT @ g)
    outside = g - x @ first
    second = total(x.mT @ outside)
    outside = outside - x @ second
    basis = _orthonormal(outside, total, off=x)
    return (first + second).double(), basis, total(gram(basis, outside)).double()


def _orthonormal(a: Tensor, total: Total, *, off: Point | None = None) -> Tensor:
    """Orthonormal or zero columns that span those of a, and are orthogonal to those of ``off``.

    By Gram matrices, twice: the second pass restores what the first loses to the square of the condition.
    """
    least = 0.0 if off is None else _rounding(a) ** 2  # energy of rounding, beside a gradient of length 1
    basis = _scaled_columns(a, total, floor=SMALL * torch.finfo(a.dtype).eps, least=least)
    if off is not None:
        basis = basis - off @ total(off.mT @ basis)
    return _scaled_columns(basis, total, floor=0.1)


def _scaled_columns(a: Tensor, total: Total, *, floor: float, least: float = 0.0) -> Tensor:
    """Orthogonal columns of length 1 that span those of a.

    0 for directions below the share ``floor`` of the largest energy, or up to the energy ``least``.
    """
    energies, vectors = torch.linalg.eigh(total(gram(a, a)).double())
    held = (energies > floor * energies[..., -1:]) & (energies > least)
    root = torch.where(held, energies, 1).rsqrt() * held
    scaled: Tensor = a @ (vectors * root.unsqueeze(-2)).to(a.dtype)
    return scaled


def _rounding(g: Tensor) -> float:
    """Length below which a part of a gradient of length 1 counts as absent."""
    return float(SMALL * torch.finfo(g.dtype).eps)


def _length(a: Tensor, total: Total) -> Tensor:
    """The Frobenius norm, with two dimensions of size 1."""
    if total is _itself:
        length: Tensor = torch.linalg.matrix_norm(a, keepdim=True)
        return length
    return total(a.square().sum(dim=(-2, -1), keepdim=True)).sqrt()


def _polar(a: Square, *, least: float = 0.0) -> tuple[Square, Tensor]:
    """The polar factor of a without its null directions and singular values up to ``least``, and the sum of all."""
    left, sigma, right = torch.linalg.svd(a, full_matrices=False)
    held = (sigma > SMALL * torch.finfo(sigma.dtype).eps * sigma[..., :1]) & (sigma > least)
    return (left * held.unsqueeze(-2)) @ right, sigma.sum(dim=-1)


NORMS: Mapping[str, Callable[[Point, Tensor, Total], tuple[Tangent, Tensor]]] = {
    "spectral": spectral,
    "frobenius": frobenius,
    "blocks": blocks,
}
"""Norms of `tangent_lmo` by name."""
