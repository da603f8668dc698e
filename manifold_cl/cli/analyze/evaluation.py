"""Scores of an adapter before and after its change, and the command that prints them."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

PLACEHOLDER = "{adapter}"
LEVEL = 0.95
Evaluate = Annotated[
    str | None,
    Option(
        metavar="COMMAND",
        help="Command that evaluates the folder put for {adapter}, before and after. Its last line is a number, or a "
        "JSON list with one number per example. Fails with code 3 if the score drops by more than --max-drop.",
    ),
]


@dataclass(frozen=True)
class Evaluation:
    """Scores before and after, and whether the drop is within its bound."""

    before: float
    after: float
    drop: float
    """Mean by which the score got worse."""
    ci_low: float | None
    """Ends of the bootstrap interval of the drop over examples; None for scores without examples."""
    ci_high: float | None
    examples: int
    max_drop: float
    level: float = LEVEL
    """Level of the interval."""

    @property
    def bound(self) -> float:
        """What is compared with `max_drop`: the upper end of the interval, or the drop where there is none."""
        return self.drop if self.ci_high is None else self.ci_high

    @property
    def passes(self) -> bool:
        """Whether the drop is within the bound: the upper end of its interval, or itself where there is none."""
        return self.bound <= self.max_drop

    @property
    def numbers(self) -> str:
        """The scores and their drop in words."""
        interval = (
            ""
            if self.ci_low is None
            else f" ({100 * self.level:.3g}% interval {self.ci_low:.4g} to {self.ci_high:.4g})"
        )
        unit = f"over {self.examples} examples" if self.examples > 1 else "one number, so without an interval"
        return (
            f"{self.before:.4g} before, {self.after:.4g} after, a drop of {self.drop:.4g}{interval}, "
            f"{self.max_drop:g} allowed; {unit}"
        )

    @property
    def sentence(self) -> str:
        """The result in words."""
        return f"evaluation {'passes' if self.passes else 'fails'}: {self.numbers}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with ``passes``."""
        return asdict(self) | {"passes": self.passes}


def evaluated(command: str, before: Path, after: Path, *, max_drop: float, lower_is_better: bool) -> Evaluation:
    """The scores that the command prints for both adapters, compared pair by pair."""
    first, second = (_scores(command, path) for path in (before, after))
    if len(first) != len(second):
        raise ValueError(f"--evaluate gave {len(first)} scores before and {len(second)} after: pairs are needed")
    return paired_evaluation(first, second, max_drop=max_drop, lower_is_better=lower_is_better)


def paired_evaluation(
    before: Sequence[float],
    after: Sequence[float],
    *,
    max_drop: float,
    lower_is_better: bool = False,
    level: float = LEVEL,
) -> Evaluation:
    """Means, and the drop with its bootstrap interval over pairs; no interval for fewer than three."""
    from manifold_cl.cli.analysis_package import analysis

    sign = -1.0 if lower_is_better else 1.0
    drops = [sign * (a - b) for a, b in zip(before, after, strict=True)]
    ends = analysis.bootstrap_interval(drops, level=level) if len(drops) > 2 else None
    low, high = ends if ends is not None else (None, None)
    first, second, drop = (sum(values) / len(values) for values in (before, after, drops))
    return Evaluation(first, second, drop, low, high, len(drops), max_drop, level)


def _scores(command: str, adapter: Path) -> list[float]:
    """The numbers in the last line that the command prints."""
    words = [word.replace(PLACEHOLDER, str(adapter)) for word in shlex.split(command)]
    shown = shlex.join(words)
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"--evaluate: {words[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or "it printed no error"
        raise ValueError(f"--evaluate: {shown} ended with code {done.returncode}: {last}")
    line = done.stdout.strip().rpartition("\n")[2]
    try:
        value = json.loads(line)
        numbers = [float(each) for each in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError):
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        expected = "a number or a JSON list of numbers was expected"
        raise ValueError(f"--evaluate: the last line of {shown} is {line[:80]!r}: {expected}")
    return numbers
