"""`check_retraction`: the laws and the declared order of a retraction."""

from __future__ import annotations

import math
import statistics
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from manifold_cl.geometry.checks.measure import (
    LONG_STEPS,
    STEPS,
    Curve,
    Law,
    Report,
    curve,
    finite_difference,
    gaussian,
    largest,
    slope,
    tangent_at,
    unit,
    worst,
)
from manifold_cl.geometry.metrics import METRICS, MetricChoice, as_metric, normalised_metric
from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel
from manifold_cl.geometry.retractions import Differentiable, Invertible, Retraction, Transporting, as_retraction
from manifold_cl.geometry.subspace import stack_bases

DRIFT_STEPS = 500
CALLS = 5


@dataclass(frozen=True)
class RetractionReport(Report):
    """The measurements of a retraction R on St(n, p; F), in float64 except the fields named float32."""

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
    float32: float
    """The larger of the two in float32."""
    batch_difference: float
    """Largest difference between a batch and its members one by one."""
    padding_difference: float
    """Largest difference that zero columns in F make."""
    drift_float32: float
    """Worst constraint error after the random float32 walk, by default of 500 steps of length 0.3."""
    inverse: float | None
    """``max|R⁻¹(x, R(x, u)) − u|`` at ``|u| = 1``; None without a closed form."""
    differential: float | None
    """Largest difference of its closed form from finite differences; None without one."""
    transport: float | None
    """Worst error of its own transport: in tangency, in both inner products, and after going back; None without one."""
    gradient: float | None
    """Largest error of autograd's derivative, at steps of length 0.7 and 0; None without a derivative."""
    graph_breaks: int | None
    """Breaks under ``torch.compile``; None if not requested."""
    seconds: float
    """Median time of a call for the three points of the check; `lab` measures times at training sizes."""
    first_order: Curve
    to_geodesic: Curve

    def laws(self) -> tuple[Law, ...]:
        """The laws of every retraction, and those of the declarations and extra methods of this one."""
        laws = [
            Law.below("R(x, 0) is off x by", self.at_zero, 1e-14),  # a few roundings of 2e-16
            # Slopes from steps of 1e-2 deviate by about 1e-2; a difference of one order is 1.
            Law.at_least("first-order slope", self.first_order_slope, 1.9),
            Law.at_least("slope to the geodesic", self.geodesic_slope, self.declared_order + 0.9),
            Law.below("the result is off the manifold by", self.orthonormality, 1e-13),
            Law.below("the result reaches into F by", self.protection, 1e-13),
            Law.below("in float32 the result is off by", self.float32, 2e-6),  # the documented bound
            Law.below("batching changes the result by", self.batch_difference, 1e-13),
            Law.below("zero columns in F change the result by", self.padding_difference, 1e-14),
            Law.below("float32 drift reaches", self.drift_float32, 2e-6),  # the documented bound
        ]
        optional = [
            # The condition of the p × p systems at |u| = 1 is below 1e2: two digits of sixteen, and some to spare.
            ("the inverse misses by", self.inverse, 1e-12),
            # Fourth-order differences at a step of 1e-3 err by 1e-12 times the fifth derivative, 1e-13 rounding.
            ("the differential is off by", self.differential, 1e-9),
            ("the transport is off by", self.transport, 1e-13),  # sums of 80 roundings
            ("the gradient is off by", self.gradient, 1e-9),
        ]
        laws += [Law.below(name, value, bound) for name, value, bound in optional if value is not None]
        if self.graph_breaks is not None:
            laws.append(Law("breaks under torch.compile", self.graph_breaks, "0", self.graph_breaks == 0))
        return tuple(laws)


def check_retraction(
    retraction: Retraction | str | Callable[[Tensor, Tensor], Tensor],
    metric: MetricChoice = "euclidean",
    *,
    n: int = 20,
    p: int = 4,
    k: int = 5,
    seed: int = 0,
    steps: int = DRIFT_STEPS,
    compiled: bool = False,
) -> RetractionReport:
    """Measure a retraction against its declarations; order by the slope of its distance to the geodesic.

    Args:
        retraction: a name, an object, or a function of (x, u).
        metric: ``"euclidean"``, ``"canonical"`` or a `BetaMetric`: the metric of the geodesics in the comparison.
        n: rows of the points.
        p: columns.
        k: protected directions.
        seed: seed of points and directions.
        steps: length of the float32 walk that measures drift, which takes most of the time.
        compiled: also count graph breaks under ``torch.compile`` (seconds the first time).

    Raises:
        ValueError: for an unknown name, a metric without a declared order, or a result of another shape.

    >>> check_retraction("polar").passed
    True
    """
    rule = as_retraction(retraction)
    called, order = _declared(rule, metric)
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(gaussian(n, k, draw=draw))[0]
    manifold = RestrictedStiefel(basis, retraction=rule, metric=metric)
    x = manifold.random(3, n, p, dtype=torch.float64, generator=draw).as_subclass(Tensor)
    u, v = tangent_at(manifold, x, draw), tangent_at(manifold, x, draw)
    y = manifold.retr(x, u)
    error = manifold.constraint_error(y)
    looped = torch.stack([manifold.retr(a, b) for a, b in zip(x, u, strict=True)])
    padded = RestrictedStiefel(stack_bases([basis], n, like=basis, width=k + 3)[0], retraction=rule)
    single = RestrictedStiefel(basis.float(), retraction=rule)

    *_, end = walk(single, n, p, steps, draw)

    def to_line(t: float) -> float:
        return float((manifold.retr(x, t * u) - x - t * u).norm())

    def to_geodesic(t: float) -> float:
        return float((manifold.retr(x, t * u) - manifold.expmap(x, t * u)).norm())

    return RetractionReport(
        name=rule.name,
        metric=called,
        declared_order=order,
        at_zero=largest(manifold.retr(x, torch.zeros_like(u)) - x),
        first_order_slope=slope(to_line),
        geodesic_slope=slope(to_geodesic, LONG_STEPS if 2 < order < math.inf else STEPS),
        orthonormality=error.orthonormality,
        protection=manifold.constraint_error(rule(x, u)).protection,  # before the manifold projects it
        float32=worst(*single.constraint_error(single.retr(x.float(), u.float()))),
        batch_difference=largest(looped - y),
        padding_difference=largest(padded.retr(x, u) - y),
        drift_float32=worst(*single.constraint_error(end)),
        inverse=largest(rule.inverse(x, y) - u) if isinstance(rule, Invertible) else None,
        differential=(
            largest(rule.differential(x, u, v) - finite_difference(lambda t: rule(x, u + t * v)))
            if isinstance(rule, Differentiable)
            else None
        ),
        transport=_transport_error(rule, basis, x, u, v) if isinstance(rule, Transporting) else None,
        gradient=_gradient_error(rule, x, u, v, draw),
        graph_breaks=_graph_breaks(rule, x, u) if compiled else None,
        seconds=statistics.median(timeit.repeat(lambda: rule(x, u), number=1, repeat=CALLS)),
        first_order=curve("to the straight line", to_line),
        to_geodesic=curve("to the geodesic", to_geodesic),
    )


def _declared(rule: Retraction, metric: MetricChoice) -> tuple[str, float | int]:
    """The metric's name, and the order that the retraction declares for it; ValueError if it declares none."""
    called = as_metric(normalised_metric(metric)).name
    if called not in rule.order:
        raise ValueError(f"the retraction {rule.name!r} declares its order for {', '.join(rule.order)}, not {called!r}")
    return called, rule.order[called]


def walk(manifold: RestrictedStiefel, n: int, p: int, steps: int, draw: torch.Generator) -> Iterator[Tensor]:
    """The points of a random walk of float32 steps of length 0.3, without the start."""
    x: Tensor = manifold.random(n, p, dtype=torch.float32, generator=draw).as_subclass(Tensor)
    for _ in range(steps):
        x = manifold.retr(x, 0.3 * tangent_at(manifold, x, draw))
        yield x


def _transport_error(rule: Transporting, basis: Tensor, x: Tensor, u: Tensor, v: Tensor) -> float:
    errors = []
    for name in METRICS:
        manifold = RestrictedStiefel(basis, retraction=rule, metric=cast(Any, name), transport="isometric")
        y, there = manifold.retr_transp(x, u, v)
        step = manifold.transp_follow_retr(x, u, u)
        back, again = manifold.retr_transp(y, -step, there)
        errors += [
            rule.transport(x, u, v) - there,  # the part that the projection removed
            manifold.inner(y, there, step) - manifold.inner(x, v, u),
            back - x,
            again - v,
        ]
    return worst(*map(largest, errors))


def _gradient_error(rule: Retraction, x: Tensor, u: Tensor, v: Tensor, draw: torch.Generator) -> float | None:
    """The error along a tangent vector; off the tangent space some retractions are not defined."""
    weight = unit(gaussian(*x.shape, draw=draw))
    errors = []
    # At 0 all singular values of x + u agree, where gradients of an SVD fail; below length 1 every form is smooth.
    for step in (0.7 * u, torch.zeros_like(u)):
        at = step.clone().requires_grad_()
        try:
            value = (rule(x, at) * weight).sum()
            if not value.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(value, at)
        except (RuntimeError, NotImplementedError):  # an in-place write, an operation without derivative
            return None
        expected = finite_difference(lambda t, step=step: (rule(x, step + t * v) * weight).sum((-2, -1)))  # type: ignore[misc]
        errors.append(largest((gradient * v).sum((-2, -1)) - expected))
    return worst(*errors)


def _graph_breaks(rule: Retraction, x: Tensor, u: Tensor) -> int:
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(rule.__call__)(x, u).graph_break_count
    torch._dynamo.reset()
    return int(breaks)
