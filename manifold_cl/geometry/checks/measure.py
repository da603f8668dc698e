"""Measurements for the checks: slopes, finite differences, random points and vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry.checks.report import Curve

STEPS = (4e-2, 2e-2, 1e-2)
"""Step lengths for slopes: small enough for the leading term, large enough to stay above rounding in float64."""
CURVE = tuple(10 ** (-2.5 + 2.5 * i / 11) for i in range(12))
"""Step lengths for figures."""
ROUNDING = 1e-13
"""Error below which two maps are equal: the rounding of a few hundred entries."""


def slope(error: Callable[[float], float], steps: Sequence[float] = STEPS) -> float:
    """Exponent q of ``error(t) ~ tᵠ``, from a log-log fit over ``steps``; infinite for an error that is zero."""
    errors = torch.tensor([error(t) for t in steps], dtype=torch.float64)
    if float(errors.max()) < ROUNDING:
        return math.inf
    t = torch.tensor(steps, dtype=torch.float64).log()
    centred = t - t.mean()
    return float((centred * errors.log()).sum() / centred.square().sum())


def curve(label: str, error: Callable[[float], float]) -> Curve:
    """The error at the lengths of `CURVE`."""
    return Curve(label, CURVE, tuple(error(t) for t in CURVE))


def finite_difference(path: Callable[[float], Tensor], h: float = 1e-3) -> Tensor:
    """The derivative of ``path`` at 0, by central differences of fourth order."""
    return (8 * (path(h) - path(-h)) - (path(2 * h) - path(-2 * h))) / (12 * h)


def largest(a: Tensor) -> float:
    """The largest absolute entry, 0 of an empty tensor."""
    return float(a.abs().max()) if a.numel() else 0.0


def worst(*errors: float) -> float:
    """The largest of the errors; NaN where one is, which Python's ``max`` would hide."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def unit(u: Tensor) -> Tensor:
    """Each vector of the batch, scaled to Frobenius length 1."""
    length: Tensor = torch.linalg.matrix_norm(u, keepdim=True)
    return u / length


def draws(seed: int) -> torch.Generator:
    """A generator that differs from a plain one of the same seed, which may have drawn the manifold."""
    return torch.Generator().manual_seed(seed ^ 0x9E3779B9)


def gaussian(*size: int, draw: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Independent normal numbers."""
    return torch.randn(*size, dtype=dtype, generator=draw)


def point_on(manifold: Any, *size: int, draw: torch.Generator) -> Tensor:
    """A float64 point of any geoopt manifold: a Gaussian matrix, projected."""
    point: Tensor = manifold.projx(gaussian(*size, draw=draw))
    return point.as_subclass(Tensor)


def tangent_at(manifold: Any, x: Tensor, draw: torch.Generator) -> Tensor:
    """A random tangent vector at x, of Frobenius length 1."""
    return unit(manifold.proju(x, gaussian(*x.shape, draw=draw, dtype=x.dtype)))


def leak(manifold: Any, u: Tensor) -> float:
    """Largest entry of ``Fᵀu``; 0 if nothing is protected."""
    basis = getattr(manifold, "complement", None)
    return 0.0 if basis is None else largest(basis.to(u.dtype).mT @ u)
