"""The gate of a changed adapter: an evaluation command, run on the adapter before and after."""

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

from manifold_cl.cli.options import GATE_CLOSED
from manifold_cl.cli.screen import screen

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
MaxDrop = Annotated[float, Option(help="Largest drop of the score that passes, in its own unit.")]
LowerIsBetter = Annotated[bool, Option("--lower-is-better", help="The score is a loss.")]


@dataclass(frozen=True)
class Evaluation:
    """Scores before and after, and whether the drop is within its bound."""

    before: float
    after: float
    drop: float
    """Mean by which the score got worse."""
    low: float | None
    """Ends of the bootstrap interval of the drop over examples; None for scores without examples."""
    high: float | None
    examples: int
    max_drop: float

    @property
    def passes(self) -> bool:
        """Whether the drop is within the bound: the upper end of its interval, or itself where there is none."""
        return (self.drop if self.high is None else self.high) <= self.max_drop

    @property
    def sentence(self) -> str:
        """The result in words."""
        interval = "" if self.low is None else f" ({LEVEL:.0%} interval {self.low:.4g} to {self.high:.4g})"
        unit = f"over {self.examples} examples" if self.examples > 1 else "one number, so without an interval"
        verdict = "passes" if self.passes else "fails"
        return (
            f"evaluation {verdict}: {self.before:.4g} before, {self.after:.4g} after, a drop of "
            f"{self.drop:.4g}{interval}, {self.max_drop:g} allowed; {unit}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with ``passes``."""
        return asdict(self) | {"passes": self.passes}


def validate_evaluation(
    command: str | None, paths: Sequence[Path], *, max_drop: float = 0.0, lower_is_better: bool = False
) -> None:
    """Refuse a command without the placeholder, several adapters, and bounds without a command."""
    if not math.isfinite(max_drop):
        raise ValueError(f"--max-drop is {max_drop}: give a number, in the unit of the score")
    if command is None:
        for option, given in (("--max-drop", max_drop != 0), ("--lower-is-better", lower_is_better)):
            if given:
                raise ValueError(f"{option} is for scores: give --evaluate with the command that prints them")
        return
    if PLACEHOLDER not in command:
        raise ValueError(f"--evaluate {command!r} has no {PLACEHOLDER}: write it where the folder's path belongs")
    if len(paths) > 1:
        raise ValueError(f"--evaluate compares one adapter with its change, {len(paths)} paths are given")


def evaluated(
    command: str | None, before: Path, after: Path, *, max_drop: float, lower_is_better: bool
) -> Evaluation | None:
    """The scores of both adapters, written into the folder of the new one; None without a command.

    Scores per example are compared pair by pair.
    """
    from manifold_cl.cli.analysis_package import analysis

    if command is None:
        return None
    first, second = (_scores(command, path) for path in (before, after))
    if len(first) != len(second):
        raise ValueError(f"--evaluate gave {len(first)} scores before and {len(second)} after: pairs are needed")
    sign = -1.0 if lower_is_better else 1.0
    drops = [sign * (a - b) for a, b in zip(first, second, strict=True)]
    ends = analysis.bootstrap_interval(drops, level=LEVEL) if len(drops) > 2 else None
    low, high = ends if ends is not None else (None, None)
    before_mean, after_mean, drop = (sum(values) / len(values) for values in (first, second, drops))
    evaluation = Evaluation(before_mean, after_mean, drop, low, high, len(drops), max_drop)
    (after / "evaluation.json").write_text(json.dumps(evaluation.to_dict(), indent=2), encoding="utf-8")
    return evaluation


def close_gate(evaluation: Evaluation | None) -> None:
    """Exit with code 3 after an evaluation that fails; nothing without one."""
    if evaluation is not None and not evaluation.passes:
        screen.say(("gate closed:", "bold red"), f" {evaluation.sentence}")
        raise SystemExit(GATE_CLOSED)


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
