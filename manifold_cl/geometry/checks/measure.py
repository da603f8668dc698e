"""Reports of checks, and the measurements they consist of: slopes, finite differences, random points and vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEPS = (4e-2, 2e-2, 1e-2)
"""Step lengths for slopes: small enough for the leading term, large enough to stay above rounding in float64."""
LONG_STEPS = (0.4, 0.3, 0.2)
"""Step lengths for slopes above 3, whose errors at the usual steps would be rounding."""
CURVE = tuple(10 ** (-2.5 + 2.5 * i / 11) for i in range(12))
"""Step lengths for figures."""
ROUNDING = 1e-13
"""Error below which two maps are equal: the rounding of a few hundred entries."""


class Law(NamedTuple):
    """A law, the number measured for it, and whether it holds."""

    name: str
    """A short description, such as ``"the result reaches into F by"``."""
    value: float
    wanted: str
    """The bound as text, such as ``"< 1e-13"``."""
    holds: bool

    @classmethod
    def below(cls, name: str, value: float, bound: float) -> Law:
        """An error that must be below ``bound``; NaN is not."""
        return cls(name, value, f"< {bound:.0e}", value < bound)

    @classmethod
    def at_least(cls, name: str, value: float, bound: float) -> Law:
        """An exponent that must reach ``bound``."""
        return cls(name, value, f"≥ {bound:g}", value >= bound)

    def __str__(self) -> str:
        return f"{self.name}: {_figure(self.value)}, wanted {self.wanted}"


class Curve(NamedTuple):
    """An error over step lengths, whose slope in a log-log plot is an order."""

    label: str
    lengths: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Report(ABC):
    """The measurements of ``name``; prints as a table of laws."""

    name: str

    @abstractmethod
    def laws(self) -> tuple[Law, ...]:
        """All laws that were tested."""

    def curves(self) -> tuple[Curve, ...]:
        """Errors over step lengths, for a figure; empty if all laws are residuals."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Curve))

    def failures(self) -> tuple[str, ...]:
        """The laws that do not hold, as text; empty if all hold."""
        return tuple(str(law) for law in self.laws() if not law.holds)

    @property
    def passed(self) -> bool:
        """Whether all laws hold."""
        return all(law.holds for law in self.laws())

    def __str__(self) -> str:
        laws = self.laws()
        width = max(len(law.name) for law in laws)
        lines = [f"{self.name}: {sum(law.holds for law in laws)} of {len(laws)} laws hold"]
        for law in laws:
            verdict = "ok  " if law.holds else "FAIL"
            lines.append(f"  {verdict}  {law.name:<{width}}  {_figure(law.value):>8}  {law.wanted}")
        return "\n".join(lines)


def _figure(value: float) -> str:
    """A slope or count with decimals, an error as a power of ten."""
    if math.isinf(value):
        return "exact"
    return f"{value:.2f}" if 0.05 <= abs(value) < 1e4 else f"{value:.1e}"


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


def frames(manifold: Any, a: Tensor) -> Tensor:
    """The points or vectors a, mapped to matrices with orthonormal columns where the manifold has ``to_frames``."""
    mapped: Tensor = manifold.to_frames(a) if hasattr(manifold, "to_frames") else a
    return mapped


def leak(manifold: Any, u: Tensor) -> float:
    """Largest entry of ``Fᵀu``; 0 if nothing is protected."""
    basis = getattr(manifold, "complement", None)
    return 0.0 if basis is None else largest(basis.to(u.dtype).mT @ u)
