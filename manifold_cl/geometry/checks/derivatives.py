"""`check_gradient` and `check_hessian`: derivatives verified by Taylor's theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry.checks.measure import curve, draws, largest, leak, point_on, slope, tangent_at, worst
from manifold_cl.geometry.checks.report import Curve, Law, Report

Cost = Callable[[Tensor], Tensor]
"""A function of a point, 0-d, that autograd can differentiate (twice for a Hessian)."""

TANGENT = 1e-12
"""Rounding of sums of a few hundred terms, relative to the vector's length."""


@dataclass(frozen=True)
class GradientReport(Report):
    """The measurements of a Riemannian gradient."""

    tangency: float
    """Largest entry of xᵀg + gᵀx and Fᵀg, relative to ``|g|``."""
    first_order_slope: float
    """Slope of ``|f(R(x, tu)) − f(x) − t g(grad, u)|`` in t: 2 for the gradient."""
    model_error: Curve

    def laws(self) -> tuple[Law, ...]:
        """Tangent, and exact to first order."""
        return (
            Law.below("the gradient leaves the tangent space by", self.tangency, TANGENT),
            Law.at_least("slope of the linear model's error", self.first_order_slope, 1.9),  # an order is 1
        )

    def curves(self) -> tuple[Curve, ...]:
        """The linear model's error."""
        return (self.model_error,)


@dataclass(frozen=True)
class HessianReport(Report):
    """The measurements of a Riemannian Hessian."""

    tangency: float
    """Largest entry of xᵀh + hᵀx and Fᵀh, relative to ``|h|``."""
    symmetry: float
    """``|g(Hu, v) − g(u, Hv)|``, relative to ``|Hu|``."""
    linearity: float
    """``|H(2u − 3v) − 2Hu + 3Hv|``, relative to ``|Hu|``."""
    second_order_slope: float
    """Slope of the quadratic model's error along geodesics: 3 for the Hessian."""
    model_error: Curve

    def laws(self) -> tuple[Law, ...]:
        """Tangent, symmetric, linear, and exact to second order."""
        return (
            Law.below("the Hessian leaves the tangent space by", self.tangency, TANGENT),
            Law.below("symmetry is off by", self.symmetry, TANGENT),
            Law.below("linearity is off by", self.linearity, TANGENT),
            Law.at_least("slope of the quadratic model's error", self.second_order_slope, 2.9),  # an order is 1
        )

    def curves(self) -> tuple[Curve, ...]:
        """The quadratic model's error."""
        return (self.model_error,)


def check_gradient(
    manifold: Any, cost: Cost, x: Tensor | None = None, *, size: tuple[int, int] | None = None, seed: int = 0
) -> GradientReport:
    """Measure ``manifold.egrad2rgrad`` of autograd's gradient of ``cost``, along a random direction.

    Args:
        manifold: a `RestrictedStiefel`, or any geoopt manifold.
        cost: the function; to check your own gradient, write it as a `torch.autograd.Function`.
        x: a float64 point; drawn if not given.
        size: (n, p) of the point that is drawn.
        seed: seed of point and direction.

    Raises:
        ValueError: when neither x nor size is given, or ``cost`` is not a differentiable scalar.
    """
    x, draw = _where(manifold, x, size, seed)
    u = tangent_at(manifold, x, draw)
    value, gradient = _gradient(cost, x)
    riemannian = manifold.egrad2rgrad(x, gradient)
    pull = float(manifold.inner(x, riemannian, u))

    def error(t: float) -> float:
        with torch.no_grad():
            return abs(float(cost(manifold.retr(x, t * u))) - value - t * pull)

    return GradientReport(
        name=f"gradient of {getattr(cost, '__name__', 'the cost')} on {type(manifold).__name__}",
        tangency=_tangency(manifold, x, riemannian),
        first_order_slope=slope(error),
        model_error=curve("linear model along the retraction", error),
    )


def check_hessian(
    manifold: Any,
    cost: Cost,
    x: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    hessian: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> HessianReport:
    """Measure a Riemannian Hessian against the second derivative of ``cost`` along geodesics.

    Args:
        manifold: a `RestrictedStiefel`, or any geoopt manifold with ``expmap``.
        cost: the function, twice differentiable by autograd.
        x: a float64 point; drawn if not given.
        size: (n, p) of the point that is drawn.
        hessian: (x, u) → Hess f(x)[u]; if not given, ``manifold.ehess2rhess`` of autograd's second derivative.
        seed: seed of point and directions.

    Raises:
        ValueError: as `check_gradient`.
    """
    x, draw = _where(manifold, x, size, seed)
    u, v = tangent_at(manifold, x, draw), tangent_at(manifold, x, draw)
    value, gradient = _gradient(cost, x)
    apply = hessian or (lambda x, u: manifold.ehess2rhess(x, gradient, _second(cost, x, u), u))
    along_u, along_v, mixed = apply(x, u), apply(x, v), apply(x, 2 * u - 3 * v)
    pull = float(manifold.inner(x, manifold.egrad2rgrad(x, gradient), u))
    bend = float(manifold.inner(x, along_u, u))
    size_of = max(float(along_u.norm()), torch.finfo(x.dtype).tiny)

    def error(t: float) -> float:
        with torch.no_grad():
            return abs(float(cost(manifold.expmap(x, t * u))) - value - t * pull - t * t * bend / 2)

    return HessianReport(
        name=f"Hessian of {getattr(cost, '__name__', 'the cost')} on {type(manifold).__name__}",
        tangency=_tangency(manifold, x, along_u),
        symmetry=abs(float(manifold.inner(x, along_u, v) - manifold.inner(x, u, along_v))) / size_of,
        linearity=largest(mixed - 2 * along_u + 3 * along_v) / size_of,
        second_order_slope=slope(error),
        model_error=curve("quadratic model along geodesics", error),
    )


def _where(manifold: Any, x: Tensor | None, size: tuple[int, int] | None, seed: int) -> tuple[Tensor, torch.Generator]:
    draw = draws(seed)
    if x is not None:
        return x.detach().double().as_subclass(Tensor), draw
    if size is None:
        raise ValueError("give a point x, or size=(n, p) to draw one")
    return point_on(manifold, *size, draw=draw), draw


def _gradient(cost: Cost, x: Tensor) -> tuple[float, Tensor]:
    at = x.detach().requires_grad_()
    value = cost(at)
    if value.ndim or not value.requires_grad:
        raise ValueError(f"the cost must return a differentiable 0-d tensor, got shape {tuple(value.shape)}")
    (gradient,) = torch.autograd.grad(value, at)
    return float(value.detach()), gradient


def _second(cost: Cost, x: Tensor, u: Tensor) -> Tensor:
    at = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cost(at), at, create_graph=True)
    if not gradient.requires_grad:  # a linear cost
        return torch.zeros_like(u)
    (second,) = torch.autograd.grad((gradient * u).sum(), at, allow_unused=True)
    return torch.zeros_like(u) if second is None else second


def _tangency(manifold: Any, x: Tensor, u: Tensor) -> float:
    residual = worst(largest(x.mT @ u + u.mT @ x), leak(manifold, u))
    return residual / max(float(u.norm()), torch.finfo(u.dtype).tiny)
