"""One finding of a report: a sentence, its number, how sure it is, and what one could do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["act", "note", "fine", "unknown"]
LEVELS: dict[str, str] = {
    "act": "needs action",
    "unknown": "not known",
    "note": "worth knowing",
    "fine": "nothing found",
}
"""Level to the words that the page shows, the most pressing first."""


@dataclass(frozen=True, eq=False)
class Finding:
    """A sentence about a set of adapters, with its evidence."""

    kind: str
    """What is measured, such as ``"answers"`` or ``"relations"``; a page shows one finding of each kind first."""
    level: Level
    headline: str
    number: str
    """The measured number, with its unit."""
    interval: str
    """The interval of that number, or the range that chance would give."""
    certainty: str
    """How sure the finding is, and what it does not show."""
    action: str
    """What the reader could do next."""
    subject: str = ""
    """Label of the run or set of adapters."""
    beyond_chance: bool = False
    """Whether it says that something is more than chance."""
    draw: Callable[[], Any] | None = None
    """Makes the figure."""
    alt: str = ""
    """The figure in one sentence."""

    def to_dict(self) -> dict[str, str]:
        """The words and numbers, for JSON."""
        names = ("kind", "level", "headline", "number", "interval", "certainty", "action", "subject")
        return {name: getattr(self, name) for name in names}


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage; a tiny one as a bound or a power of ten.

    >>> percent(0.0423), percent(0.00002), percent(0.0)
    ('4.2 %', '2e−05', '0 %')
    """
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    text = f"{100 * value:.{digits}f} %" if abs(value) >= 0.0005 else f"{value:.0e}"
    return text.replace("-", "−")


def probability(p: float) -> str:
    """A p-value as text.

    >>> probability(0.031), probability(1e-9)
    ('p = 0.031', 'p < 0.0001')
    """
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
