"""Checks of a manifold: its projections, its vector transport, its gradients and its Hessians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry.checks.measure import (
    Curve,
    Law,
    Report,
    curve,
    draws,
    finite_difference,
    frames,
    gaussian,
    largest,
    leak,
    point_on,
    slope,
    tangent_at,
    unit,
    worst,
)
from manifold_cl.linalg import gram_error

Cost = Callable[[Tensor], Tensor]
"""A function of a point, 0-d, that autograd can differentiate (twice for a Hessian)."""

LIMIT = 1e-12
"""Rounding of sums of a few hundred float64 terms, relative to the vectors' length."""


@dataclass(frozen=True)
class ProjectionReport(Report):
    """The measurements of a manifold's projections, relative to vectors of length 1."""

    idempotence: float
    """``|Π(Π(z)) − Π(z)|``."""
    self_adjointness: float
    """``|⟨Π(z), w⟩ − ⟨z, Π(w)⟩|``."""
    tangency: float
    """Largest entry of xᵀu + uᵀx and Fᵀu for u = Π(z)."""
    duality: float
    """``|g(grad, v) − ⟨G, v⟩|`` for a tangent v."""
    point: float
    """Worst constraint error of projx of an arbitrary matrix."""
    nearest: float
    """Largest entry of projx(x + normal) − x for a small normal vector."""

    def laws(self) -> tuple[Law, ...]:
        """All residuals below 1e-12, except that of the nearest point, of second order in a step of 1e-4."""
        return (
            Law.below("projecting twice differs from once by", self.idempotence, LIMIT),
            Law.below("self-adjointness is off by", self.self_adjointness, LIMIT),
            Law.below("projected vectors leave the tangent space by", self.tangency, LIMIT),
            Law.below("the gradient pairs wrongly with tangent vectors by", self.duality, LIMIT),
            Law.below("projected points are off the manifold by", self.point, LIMIT),
            Law.below("projx moves along the manifold by", self.nearest, 1e-7),  # the square of 1e-4, ten times
        )


@dataclass(frozen=True)
class TransportReport(Report):
    """The measurements of ``retr_transp`` along a step, in float64."""

    kind: str
    reversible: bool
    agreement: float
    """Largest difference of the point from ``retr``."""
    tangency: float
    """Largest entry of yᵀv + vᵀy and Fᵀv for the vector carried to y."""
    at_zero: float
    """Largest change of a vector that is carried by a zero step."""
    linearity: float
    """Largest entry of T(2v − 3w) − 2T(v) + 3T(w)."""
    isometry: float
    """Largest change of an inner product in the manifold's metric."""
    way_back: float
    """Largest error of point and vector after going back with the carried step."""
    derivative: float
    """Largest difference from the derivative of the retraction, by finite differences."""

    def laws(self) -> tuple[Law, ...]:
        """Always tangent, linear and consistent; isometric and undone by the step back if reversible."""
        laws = [
            Law.below("the point differs from the retraction's by", self.agreement, 1e-14),  # the same arithmetic
            Law.below("carried vectors leave the tangent space by", self.tangency, 1e-13),  # sums of 80 roundings
            Law.below("a zero step changes vectors by", self.at_zero, 1e-13),
            Law.below("linearity is off by", self.linearity, 1e-12),  # ten roundings of numbers up to 5
        ]
        if self.reversible:
            laws += [
                Law.below("inner products change by", self.isometry, 1e-13),
                Law.below("the way back misses by", self.way_back, 1e-12),  # two steps and two vectors
            ]
        if self.kind == "differentiated":
            # Fourth-order differences at a step of 1e-3 err by 1e-12 times the fifth derivative, 1e-13 rounding.
            laws.append(Law.below("it differs from the retraction's derivative by", self.derivative, 1e-9))
        return tuple(laws)


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
            Law.below("the gradient leaves the tangent space by", self.tangency, LIMIT),
            Law.at_least("slope of the linear model's error", self.first_order_slope, 1.9),  # an order is 1
        )


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
            Law.below("the Hessian leaves the tangent space by", self.tangency, LIMIT),
            Law.below("symmetry is off by", self.symmetry, LIMIT),
            Law.below("linearity is off by", self.linearity, LIMIT),
            Law.at_least("slope of the quadratic model's error", self.second_order_slope, 2.9),  # an order is 1
        )


def check_projection(manifold: Any, n: int, p: int, *, seed: int = 0) -> ProjectionReport:
    """Measure the laws of ``proju``, ``egrad2rgrad`` and ``projx`` at a random point of size n × p, in float64.

    ``manifold`` is a `RestrictedStiefel`, any geoopt manifold of n × p matrices with orthonormal columns, or one with
    a linear map ``to_frames`` to such matrices. The laws are then those of the frames.
    """
    draw = draws(seed)
    x = point_on(manifold, n, p, draw=draw)
    z, w, g = (unit(gaussian(n, p, draw=draw)) for _ in range(3))
    u, v = manifold.proju(x, z), manifold.proju(x, w)
    y = manifold.projx(gaussian(n, p, draw=draw))
    return ProjectionReport(
        name=f"projections of {type(manifold).__name__} at a {n} × {p} point",
        idempotence=float((manifold.proju(x, u) - u).norm()),
        self_adjointness=abs(
            float((frames(manifold, u) * frames(manifold, w)).sum() - (frames(manifold, z) * frames(manifold, v)).sum())
        ),
        tangency=_tangency(manifold, x, u),
        duality=abs(float(manifold.inner(x, manifold.egrad2rgrad(x, g), v) - (g * v).sum())),
        point=worst(largest(gram_error(frames(manifold, y))), leak(manifold, y)),
        nearest=largest(manifold.projx(x + 1e-4 * (z - u)) - x),
    )


def check_transport(manifold: Any, n: int, p: int, *, seed: int = 0, length: float = 1.0) -> TransportReport:
    """Measure the transport of ``manifold`` along a random step between n × p points.

    ``manifold`` is a `RestrictedStiefel`, or any geoopt manifold with ``retr_transp``; ``length`` is the Frobenius
    length of the step.
    """
    draw = draws(seed)
    x = point_on(manifold, n, p, draw=draw)
    u, v, w = (tangent_at(manifold, x, draw) for _ in range(3))
    u = length * u
    y, there = manifold.retr_transp(x, u, v)
    _, other = manifold.retr_transp(x, u, w)
    _, mixed = manifold.retr_transp(x, u, 2 * v - 3 * w)
    step = manifold.transp_follow_retr(x, u, u)
    back, again = manifold.retr_transp(y, -step, there)
    pairs = ((there, there, v, v), (there, other, v, w), (step, other, u, w))
    derivative = finite_difference(lambda t: manifold.retr(x, u + t * v))
    kind = getattr(manifold, "transport", "projection")
    return TransportReport(
        name=f"{kind} transport of {type(manifold).__name__} along a step of length {length:g}",
        kind=kind,
        reversible=bool(manifold.reversible),
        agreement=largest(y - manifold.retr(x, u)),
        tangency=_tangency(manifold, y, there),
        at_zero=largest(manifold.retr_transp(x, torch.zeros_like(u), v)[1] - v),
        linearity=largest(mixed - 2 * there + 3 * other),
        isometry=worst(*(abs(float(manifold.inner(y, a, b) - manifold.inner(x, c, d))) for a, b, c, d in pairs)),
        way_back=worst(largest(back - x), largest(again - v)),
        derivative=largest(there - derivative),
    )


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
    draw = draws(seed)
    x = _point(manifold, x, size, draw)
    u = tangent_at(manifold, x, draw)
    value, gradient = _gradient(cost, x)
    riemannian = manifold.egrad2rgrad(x, gradient)
    pull = float(manifold.inner(x, riemannian, u))

    def error(t: float) -> float:
        with torch.no_grad():
            return abs(float(cost(manifold.retr(x, t * u))) - value - t * pull)

    return GradientReport(
        name=f"gradient of {getattr(cost, '__name__', 'the cost')} on {type(manifold).__name__}",
        tangency=_tangency(manifold, x, riemannian) / _length(riemannian),
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

    Args and errors as `check_gradient`; the manifold has ``expmap``, and autograd differentiates ``cost`` twice.
    ``hessian`` maps (x, u) to Hess f(x)[u]; if not given, ``manifold.ehess2rhess`` of autograd's second derivative.
    """
    draw = draws(seed)
    x = _point(manifold, x, size, draw)
    u, v = tangent_at(manifold, x, draw), tangent_at(manifold, x, draw)
    value, gradient = _gradient(cost, x)
    apply = hessian or (lambda x, u: manifold.ehess2rhess(x, gradient, _second(cost, x, u), u))
    along_u, along_v, mixed = apply(x, u), apply(x, v), apply(x, 2 * u - 3 * v)
    pull = float(manifold.inner(x, manifold.egrad2rgrad(x, gradient), u))
    bend = float(manifold.inner(x, along_u, u))
    size_of = _length(along_u)

    def error(t: float) -> float:
        with torch.no_grad():
            return abs(float(cost(manifold.expmap(x, t * u))) - value - t * pull - t * t * bend / 2)

    return HessianReport(
        name=f"Hessian of {getattr(cost, '__name__', 'the cost')} on {type(manifold).__name__}",
        tangency=_tangency(manifold, x, along_u) / size_of,
        symmetry=abs(float(manifold.inner(x, along_u, v) - manifold.inner(x, u, along_v))) / size_of,
        linearity=largest(mixed - 2 * along_u + 3 * along_v) / size_of,
        second_order_slope=slope(error),
        model_error=curve("quadratic model along geodesics", error),
    )


def _point(manifold: Any, x: Tensor | None, size: tuple[int, int] | None, draw: torch.Generator) -> Tensor:
    if x is not None:
        return x.detach().double().as_subclass(Tensor)
    if size is None:
        raise ValueError("give a point x, or size=(n, p) to draw one")
    return point_on(manifold, *size, draw=draw)


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
    inside = frames(manifold, x).mT @ frames(manifold, u)
    return worst(largest(inside + inside.mT), leak(manifold, u))


def _length(u: Tensor) -> float:
    return max(float(u.norm()), torch.finfo(u.dtype).tiny)
