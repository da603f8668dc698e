"""Options of a run's training that are the same for all methods."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

from manifold_cl.continual.validation import each, one_of, option, unless_none, validate_options
from manifold_cl.rules import validate_number, validate_positive, validate_share, validate_whole

ALWAYS = ("epochs", "batch_size", "warmup", "seed", "evaluate_on")
"""Fields that every record's configuration has; it has others only where they differ from their default."""


@dataclass(frozen=True)
class Training:
    """How every task is trained, the same for all methods.

    Args:
        epochs: passes over a task's training split, one number for all tasks or one per task.
        batch_size: examples per forward pass of one rank.
        warmup: share of the steps over which the learning rate rises linearly; then it falls as a cosine to 0.
        seed: of everything random in the run; data selection has its own fixed seed.
        evaluate_on: the split that is scored; ``"validation"`` while tuning.
        accumulation: batches per rank and step, whose gradients are added.
        clip: largest norm of the gradient over all trained parameters, Riemannian on manifolds; None for no limit.
        rates: factors on the method's learning rates, one per task; 1 for all by default.
    """

    epochs: int | tuple[int, ...] = option(1, each(validate_whole))
    batch_size: int = option(16, validate_whole)
    warmup: float = option(0.1, partial(validate_share, zero=True))
    seed: int = 0
    evaluate_on: Literal["train", "validation", "test"] = option("test", one_of("train", "validation", "test"))
    accumulation: int = option(1, validate_whole)
    clip: float | None = option(None, unless_none(validate_positive))
    rates: tuple[float, ...] = option((), each(partial(validate_number, least=0.0)))

    def __post_init__(self) -> None:
        for name in ("epochs", "rates"):
            if isinstance(value := getattr(self, name), list):  # as in files
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.rates, tuple):
            raise TypeError(f"rates is a list with one factor per task, got {self.rates!r}")
        validate_options(self)

    def validate_tasks(self, count: int) -> None:
        """Raise ValueError for lists of another length than the number of tasks."""
        for name in ("epochs", "rates"):
            value = getattr(self, name)
            if isinstance(value, tuple) and (value or name == "epochs") and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries for {count} tasks: give one per task")

    def epochs_of(self, index: int) -> int:
        """Epochs of one task."""
        return self.epochs[index] if isinstance(self.epochs, tuple) else self.epochs

    def rate_of(self, index: int) -> float:
        """Factor on the learning rates of one task."""
        return self.rates[index] if self.rates else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The entries of a record's configuration."""
        default = {entry.name: entry.default for entry in fields(self) if entry.default is not MISSING}
        return {k: v for k, v in asdict(self).items() if k in ALWAYS or v != default[k]}
