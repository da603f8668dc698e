"""Numerical verification that returns data: what a retraction and a manifold promise, measured.

Anybody can run these on a retraction of their own; the library's contract tests are nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from manifold_cl.geometry.metrics import METRICS
from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel
from manifold_cl.geometry.retractions import Differentiable, Invertible, Retraction, Transporting, as_retraction
from manifold_cl.geometry.subspace import stack_bases

STEPS = (4e-2, 2e-2, 1e-2)
"""Step lengths for slopes: small enough for the leading term, large enough to stay above rounding in float64."""
DRIFT_STEPS = 500


@dataclass(frozen=True)
class RetractionReport:
    """What was measured of a retraction R on St(n, p; F), in float64 unless the name says otherwise."""

    name: str
    metric: str
    declared_order: float | int
    at_zero: float
    """``max|R(x, 0) − x|``."""
    first_order_slope: float
    """Slope of ``|R(x, tu) − x − tu|`` in t: 2 for a retraction."""
    geodesic_slope: float
    """Slope of ``|R(x, tu) − exp(x, tu)|`` in t: order + 1."""
    orthonormality: float
    """``max|yᵀy − I|`` at a step of length 1."""
    protection: float
    """``max|Fᵀy|`` at a step of length 1."""
    batch_difference: float
    """Largest difference between a batch and its members one by one."""
    padding_difference: float
    """Largest difference that zero columns in F make."""
    drift_float32: float
    """Worst constraint error after 500 random float32 steps of length 0.3."""
    inverse: float | None
    """``max|R⁻¹(x, R(x, u)) − u|`` at ``|u| = 1``; None without a closed form."""
    differential: float | None
    """Largest difference of its closed form from finite differences; None without one."""
    transport: float | None
    """Worst error of its own transport: in tangency, in both inner products, and after going back; None without one."""

    def failures(self) -> tuple[str, ...]:
        """The promises that do not hold, in words; empty if all do."""
        checks = {
            f"R(x, 0) is off x by {self.at_zero:.1e}": self.at_zero < 1e-14,  # a few roundings of 2e-16
            f"first-order slope is {self.first_order_slope:.2f}, not 2": self.first_order_slope > 1.9,
            # Slopes from steps of 1e-2 deviate by about 1e-2; a whole order is a difference of 1.
            f"order is {self.geodesic_slope - 1:.2f}, declared {self.declared_order}": self.geodesic_slope
            >= self.declared_order + 0.9,
            f"result is off the manifold by {self.orthonormality:.1e}": self.orthonormality < 1e-13,
            f"result reaches into F by {self.protection:.1e}": self.protection < 1e-13,
            f"batching changes the result by {self.batch_difference:.1e}": self.batch_difference < 1e-13,
            f"zero columns change the result by {self.padding_difference:.1e}": self.padding_difference < 1e-14,
            f"float32 drift reaches {self.drift_float32:.1e}": self.drift_float32 < 2e-6,  # the promise
            # The condition of the p × p systems at |u| = 1 is below 1e2: two digits of sixteen, and some to spare.
            f"inverse misses by {self.inverse or 0:.1e}": (self.inverse or 0) < 1e-12,
            # Fourth-order differences at a step of 1e-3 err by 1e-12 times the fifth derivative, and by 1e-13 rounding.
            f"differential is off by {self.differential or 0:.1e}": (self.differential or 0) < 1e-9,
            f"transport is off by {self.transport or 0:.1e}": (self.transport or 0) < 1e-13,  # sums of 80 roundings
        }
        return tuple(said for said, holds in checks.items() if not holds)


@dataclass(frozen=True)
class ProjectionReport:
    """What was measured of a manifold's projections, relative to vectors of length 1."""

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

    def failures(self) -> tuple[str, ...]:
        """The laws that do not hold to 1e-12 (float64 rounding of sums of a few hundred terms)."""
        return tuple(f"{law}: {error:.1e}" for law, error in vars(self).items() if not error < 1e-12)


def check_retraction(
    retraction: Retraction | str | Callable[[Tensor, Tensor], Tensor],
    metric: Literal["euclidean", "canonical"] = "euclidean",
    *,
    n: int = 20,
    p: int = 4,
    k: int = 5,
    seed: int = 0,
) -> RetractionReport:
    """Measure a retraction against its declarations; order by the slope of its distance to the geodesic.

    Args:
        retraction: a name, an object, or a bare function of (x, u).
        metric: ``"euclidean"`` or ``"canonical"``: the metric whose geodesics are compared with.
        n: rows of the points.
        p: columns.
        k: protected directions.
        seed: of points and directions.

    >>> check_retraction("polar").failures()
    ()
    """
    rule = as_retraction(retraction)
    if metric not in rule.order:
        raise ValueError(f"the retraction {rule.name!r} declares its order for {', '.join(rule.order)}, not {metric!r}")
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=draw))[0]
    manifold = RestrictedStiefel(basis, retraction=rule, metric=metric)
    x, u = _point_and_unit_tangent(manifold, (3, n, p), draw)
    v = _unit(manifold.proju(x, torch.randn(*x.shape, dtype=torch.float64, generator=draw)))
    y = manifold.retr(x, u)
    error = manifold.constraint_error(y)
    looped = torch.stack([manifold.retr(a, b) for a, b in zip(x, u, strict=True)])
    padded = RestrictedStiefel(stack_bases([basis], n, like=basis, width=k + 3)[0], retraction=rule)
    return RetractionReport(
        name=rule.name,
        metric=metric,
        declared_order=rule.order[metric],
        at_zero=_largest(manifold.retr(x, torch.zeros_like(u)) - x),
        first_order_slope=slope(lambda t: float((manifold.retr(x, t * u) - x - t * u).norm())),
        geodesic_slope=slope(lambda t: float((manifold.retr(x, t * u) - manifold.expmap(x, t * u)).norm())),
        orthonormality=error.orthonormality,
        protection=error.protection,
        batch_difference=_largest(looped - y),
        padding_difference=_largest(padded.retr(x, u) - y),
        drift_float32=_drift(RestrictedStiefel(basis.float(), retraction=rule), n, p, draw),
        inverse=_largest(rule.inverse(x, y) - u) if isinstance(rule, Invertible) else None,
        differential=_differential_error(rule, x, u, v) if isinstance(rule, Differentiable) else None,
        transport=_transport_error(rule, basis, x, u, v) if isinstance(rule, Transporting) else None,
    )


def check_projection(manifold: RestrictedStiefel, n: int, p: int, *, seed: int = 0) -> ProjectionReport:
    """Measure the laws of ``proju``, ``egrad2rgrad`` and ``projx`` at a random point of size n × p, in float64."""
    draw = torch.Generator().manual_seed(seed)
    x = manifold.random(n, p, dtype=torch.float64, generator=draw)
    z, w, g = (_unit(torch.randn(n, p, dtype=torch.float64, generator=draw)) for _ in range(3))
    u, v = manifold.proju(x, z), manifold.proju(x, w)
    leak = manifold.complement.double().mT @ u if manifold.complement is not None else u.new_zeros(1, 1)
    return ProjectionReport(
        idempotence=float((manifold.proju(x, u) - u).norm()),
        self_adjointness=abs(float((u * w).sum() - (z * v).sum())),
        tangency=max(_largest(x.mT @ u + u.mT @ x), _largest(leak)),
        duality=abs(float(manifold.inner(x, manifold.egrad2rgrad(x, g), v) - (g * v).sum())),
        point=max(manifold.constraint_error(manifold.projx(z))),
    )


def slope(error: Callable[[float], float]) -> float:
    """Exponent q of ``error(t) ~ tᵠ``, from the log-log fit over `STEPS`; infinite for an error that is zero."""
    errors = torch.tensor([error(t) for t in STEPS], dtype=torch.float64)
    if float(errors.max()) < 1e-13:  # rounding of a few hundred entries: the maps are equal
        return float("inf")
    t = torch.tensor(STEPS, dtype=torch.float64).log()
    centred = t - t.mean()
    return float((centred * errors.log()).sum() / centred.square().sum())


def finite_difference(curve: Callable[[float], Tensor], h: float = 1e-3) -> Tensor:
    """The derivative of ``curve`` at 0, by central differences of fourth order."""
    return (8 * (curve(h) - curve(-h)) - (curve(2 * h) - curve(-2 * h))) / (12 * h)


def _differential_error(rule: Differentiable, x: Tensor, u: Tensor, v: Tensor) -> float:
    return _largest(rule.differential(x, u, v) - finite_difference(lambda t: rule(x, u + t * v)))


def _transport_error(rule: Transporting, basis: Tensor, x: Tensor, u: Tensor, v: Tensor) -> float:
    errors = []
    for name in METRICS:
        manifold = RestrictedStiefel(basis, retraction=rule, metric=cast(Any, name), transport="isometric")
        y, there = manifold.retr_transp(x, u, v)
        step = manifold.transp_follow_retr(x, u, u)
        back, again = manifold.retr_transp(y, -step, there)
        errors += [
            rule.transport(x, u, v) - there,  # what the projection removed of it
            manifold.inner(y, there, step) - manifold.inner(x, v, u),
            back - x,
            again - v,
        ]
    return max(_largest(error) for error in errors)


def _drift(manifold: RestrictedStiefel, n: int, p: int, draw: torch.Generator) -> float:
    x = manifold.random(n, p, dtype=torch.float32, generator=draw).as_subclass(Tensor)
    for _ in range(DRIFT_STEPS):
        u = manifold.proju(x, torch.randn(n, p, generator=draw))
        x = manifold.retr(x, 0.3 * _unit(u))
    return max(manifold.constraint_error(x))


def _point_and_unit_tangent(
    manifold: RestrictedStiefel, size: tuple[int, ...], draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    x = manifold.random(*size, dtype=torch.float64, generator=draw).as_subclass(Tensor)
    u = manifold.proju(x, torch.randn(*size, dtype=torch.float64, generator=draw))
    return x, _unit(u)


def _unit(u: Tensor) -> Tensor:
    length: Tensor = torch.linalg.matrix_norm(u, keepdim=True)
    return u / length


def _largest(a: Tensor) -> float:
    return float(a.abs().max()) if a.numel() else 0.0
