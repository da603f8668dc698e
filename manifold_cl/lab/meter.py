"""The meter between a contestant and a problem: counts evaluations, takes the time, and records the gap."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.lab.problems import Problem

FEASIBLE = 1e-9
"""Constraint error up to which the cost at a point itself counts; else the cost at the nearest point counts."""
DIVERGED = 10.0
"""Relative gap, and ``|xᵀx − I|_max``, above which a run ends as diverged."""


class RunEnded(Exception):  # noqa: N818  # no error: it ends a run, also inside a solver of others
    """Raised by the meter when the gap is closed, a budget is used up, or the run diverges."""


@dataclass(frozen=True)
class Limits:
    """When a run ends."""

    evaluations: int
    """Gradients and Hessian products."""
    seconds: float = math.inf
    gap: float = 1e-8
    """Relative gap that is small enough."""


@dataclass(frozen=True)
class Entry:
    """The state of a run at one gradient."""

    evaluations: int
    seconds: float
    gap: float
    """``(f(x) − f*) / (f(x₀) − f*)``, at the nearest point of the manifold if x is off it."""
    orthonormality: float
    """``|xᵀx − I|_max``."""
    leak: float
    """``|Fᵀx|_max``."""


@dataclass
class Meter:
    """Evaluates a problem for one run. The clock stops while the meter records.

    Seconds are those that the thread computes (CPU time), so that other programs on the machine do not count.

    Args:
        problem: what is minimised.
        start: the point that gaps are relative to.
        limits: when to end the run.
    """

    problem: Problem
    start: Tensor
    limits: Limits
    entries: list[Entry] = field(default_factory=list)
    evaluations: int = 0
    _seconds: float = 0.0
    _since: float | None = None

    def __post_init__(self) -> None:
        self._manifold = self.problem.manifold()
        self._first = float(self.problem.cost(self.start)) - self.problem.optimum

    def gradient(self, x: Tensor) -> Tensor:
        """The Euclidean gradient at x, after recording x. RunEnded when the run is over."""
        self._pause()
        self.record(x)
        self._since = time.thread_time()
        self.evaluations += 1
        return self.problem.gradient(x)

    def hessian(self, x: Tensor, v: Tensor) -> Tensor:
        """The Euclidean Hessian at x along v; counts as an evaluation. RunEnded when the run is over."""
        if self.evaluations >= self.limits.evaluations:
            self._pause()
            raise RunEnded
        self.evaluations += 1
        return self.problem.hessian(x, v)

    def cost(self, x: Tensor) -> Tensor:
        """The cost at x, as a line search needs it: takes time, and counts as no evaluation."""
        return self.problem.cost(x)

    def record(self, x: Tensor) -> None:
        """Append an entry for x. RunEnded when the run is over."""
        orthonormality, leak = residuals(self._manifold, x)
        finite = math.isfinite(leak) and orthonormality <= DIVERGED
        near = x if not finite or max(orthonormality, leak) <= FEASIBLE else nearest_point(self.problem.complement, x)
        gap = (float(self.problem.cost(near)) - self.problem.optimum) / self._first if finite else math.inf
        self.entries.append(Entry(self.evaluations, self._seconds, gap, orthonormality, leak))
        spent = self.evaluations >= self.limits.evaluations or self._seconds >= self.limits.seconds
        if spent or not self.limits.gap < gap <= DIVERGED:
            raise RunEnded

    def _pause(self) -> None:
        if self._since is not None:
            self._seconds += time.thread_time() - self._since
            self._since = None

    def finish(self, x: Tensor) -> None:
        """Record the last point of a run that ended by itself."""
        self._pause()
        self.record(x)


def residuals(manifold: RestrictedStiefel, x: Tensor) -> tuple[float, float]:
    """``(|xᵀx − I|_max, |Fᵀx|_max)``."""
    f, eye = manifold.complement, torch.eye(x.shape[-1], dtype=x.dtype)
    leak = 0.0 if f is None or not f.shape[-1] else float((f.to(x.dtype).mT @ x).abs().max())
    return float((x.mT @ x - eye).abs().max()), leak


def nearest_point(f: Tensor, x: Tensor) -> Tensor:
    """The nearest point of the manifold: the polar factor of the part of x off F."""
    x = x - f @ (f.mT @ x)
    u, _, v = torch.linalg.svd(x - f @ (f.mT @ x), full_matrices=False)
    y: Tensor = u @ v
    return y
