"""A step without a retraction from what a user gives, tried before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.infeasible.protocol import FunctionStep, InfeasibleStep
from manifold_cl.infeasible.registry import INFEASIBLE_STEPS

ROUNDING = 1e-10
"""Largest error of the trial, in float64 on matrices of 12 × 3; own steps have 1e-15."""


def as_infeasible_step(choice: InfeasibleStep | str | Callable[..., Tensor]) -> InfeasibleStep:
    """The step for a name, an object, a class, or a function ``f(x, d, lr=...)``, after a trial on a small problem.

    Raises:
        ValueError: for an unknown name; for a step that changes the shape, moves a point without a displacement, or
            leaves the complement of the protected directions (the message gives the measured leak).
        TypeError: for anything that cannot be called.
    """
    if isinstance(choice, type):
        choice = choice()
    if isinstance(choice, str):
        step = INFEASIBLE_STEPS[choice]
    elif isinstance(choice, InfeasibleStep):
        step = choice
    elif callable(choice):
        step = FunctionStep(choice)
    else:
        raise TypeError(f"a step is a name, an InfeasibleStep or a function, got {type(choice).__name__}")
    try_step(step)
    return step


def try_step(step: InfeasibleStep) -> None:
    """Take a step on a small restricted manifold, in float64; ValueError names what is wrong, with its size."""
    draw = torch.Generator().manual_seed(0)
    space = RestrictedStiefel(torch.randn(12, 4, dtype=torch.float64, generator=draw))
    x = space.random(12, 3, generator=draw).as_subclass(Tensor)
    d: Any = 0.1 * space.proju(x, torch.randn(12, 3, dtype=torch.float64, generator=draw))
    y, still = step(x, d, lr=0.1), step(x, torch.zeros_like(d), lr=0.1)
    if y.shape != x.shape:
        raise ValueError(f"the step {step.name!r} returned shape {tuple(y.shape)} for {tuple(x.shape)}: keep it")
    assert space.complement is not None
    leak = float((space.complement.mT @ y).abs().max())
    if not leak <= ROUNDING:
        raise ValueError(
            f"the step {step.name!r} leaves the complement: max|Fᵀy| = {leak:.1e} for x and d orthogonal to F. It must "
            "return x a + d b with p × p factors"
        )
    moved = float((still - x).abs().max())
    if not moved <= ROUNDING:
        raise ValueError(f"the step {step.name!r} moves a point by {moved:.1e} where the displacement is 0")
