"""A plan: bytes per device line by line, and the most that exists at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["always", "training", "statistics", "disk"]


@dataclass(frozen=True)
class PlanLine:
    """Bytes per device of one kind of memory, when it exists, and what is counted; ``"disk"`` is in no total."""

    name: str
    nbytes: int
    phase: Phase
    note: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run per device, in bytes: `lines`, and `peak` of training and of the statistics passes.

    ``setup`` holds what was planned: model, method, batch, and so on.
    """

    setup: Mapping[str, Any]
    lines: tuple[PlanLine, ...]
    held: int = 0
    """Bytes of the activations that autograd holds for the backward pass."""

    savings: tuple[Any, ...] = ()
    """Changes that need less memory (`Saving`), the largest saving first."""

    def __getitem__(self, name: str) -> int:
        """Bytes of a line; 0 where the plan has no such line."""
        return sum(line.nbytes for line in self.lines if line.name == name)

    def total(self, phase: Literal["training", "statistics"]) -> int:
        """Bytes that exist together while training, or during the passes for start and memory."""
        return sum(line.nbytes for line in self.lines if line.phase in ("always", phase))

    @property
    def peak(self) -> int:
        """The larger total."""
        return max(self.total("training"), self.total("statistics"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "setup": dict(self.setup),
            "lines": [{"name": e.name, "bytes": e.nbytes, "phase": e.phase, "note": e.note} for e in self.lines],
            "held": self.held,
            "savings": [saving.to_dict() for saving in self.savings],
            "total": {"training": self.total("training"), "statistics": self.total("statistics")},
        }

    def __str__(self) -> str:
        width = max(len(line.name) for line in self.lines)
        rows = [f"{line.name:<{width}}  {gigabytes(line.nbytes):>9}  {line.note}".rstrip() for line in self.lines]
        totals = [f"{phase:<{width}}  {gigabytes(self.total(phase)):>9}  total" for phase in ("training", "statistics")]
        return "\n".join(rows + totals)


def gigabytes(nbytes: float) -> str:
    """Bytes with a unit, 1 GB = 10⁹ bytes.

    >>> gigabytes(2_190_000_000), gigabytes(45_000_000), gigabytes(300)
    ('2.19 GB', '45.0 MB', '0.3 kB')
    """
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"
