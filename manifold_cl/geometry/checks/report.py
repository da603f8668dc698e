"""Reports of checks: measured numbers, the laws that bound them, and curves for figures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple


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
        return ()

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
        held = sum(law.holds for law in laws)
        rows = [
            f"  {'ok  ' if law.holds else 'FAIL'}  {law.name:<{width}}  {_figure(law.value):>8}  {law.wanted}"
            for law in laws
        ]
        return "\n".join([f"{self.name}: {held} of {len(laws)} laws hold", *rows])


def _figure(value: float) -> str:
    """A slope or count with decimals, an error with its power of ten."""
    if math.isinf(value):
        return "exact"
    return f"{value:.2f}" if 0.05 <= abs(value) < 1e4 else f"{value:.1e}"
