"""The gate of a changed adapter: an evaluation command, run on the adapter before and after."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from typer import Option

from manifold_cl.cli.options import GATE_CLOSED
from manifold_cl.cli.screen import screen

if TYPE_CHECKING:
    from manifold_cl.cli.analysis_package import analysis
    from manifold_cl.continual import TaskStream

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


class Verdict(Protocol):
    """The result of an evaluation: one number, or one per task."""

    @property
    def passes(self) -> bool:
        """Whether the adapter passes the gate."""

    @property
    def sentence(self) -> str:
        """The result in words."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with ``passes``."""


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
    level: float = LEVEL
    """Level of the interval."""

    @property
    def bound(self) -> float:
        """What is compared with `max_drop`: the upper end of the interval, or the drop where there is none."""
        return self.drop if self.high is None else self.high

    @property
    def passes(self) -> bool:
        """Whether the drop is within the bound: the upper end of its interval, or itself where there is none."""
        return self.bound <= self.max_drop

    @property
    def numbers(self) -> str:
        """The scores and their drop in words."""
        interval = "" if self.low is None else f" ({100 * self.level:.3g}% interval {self.low:.4g} to {self.high:.4g})"
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


class Evaluator:
    """Evaluates an adapter before and after its change, by a command or on a stream; nothing without either."""

    def __init__(
        self,
        command: str | None,
        stream: str | None,
        paths: Sequence[Path],
        *,
        model: str | None = None,
        max_drop: float = 0.0,
        lower_is_better: bool = False,
        device: str = "cpu",
    ) -> None:
        """Refuse options that contradict each other. The stream is opened, before the work whose result it scores."""
        validate_evaluation(command, stream, paths, max_drop=max_drop, lower_is_better=lower_is_better)
        self.command, self.path = command, paths[0]
        self.max_drop, self.lower_is_better, self.device = max_drop, lower_is_better, device
        self._model, self._reads_model = model, stream is not None and Path(stream).is_dir()
        self._stream: TaskStream | None = None
        if stream is not None:
            from manifold_cl.cli.analyze.stream_evaluation import opened

            self._stream = opened(stream, model)

    def model_for(self, data: Sequence[str] | None) -> str | None:
        """The ``--model`` that belongs to ``--data``: None where it is given for the stream alone."""
        return None if self._reads_model and not data else self._model

    def __call__(self, before: analysis.AdapterSet, after: analysis.AdapterSet, folder: Path) -> Verdict | None:
        """The scores of both adapters, also written into the folder of the new one."""
        found: Verdict | None = None
        if self._stream is not None:
            from manifold_cl.cli.analyze.stream_evaluation import evaluate_on

            found = evaluate_on(self._stream, before, after, max_drop=self.max_drop, device=self.device)
        elif self.command is not None:
            bounds: dict[str, Any] = {"max_drop": self.max_drop, "lower_is_better": self.lower_is_better}
            found = evaluated(self.command, self.path, folder, **bounds)
        if found is not None:
            (folder / "evaluation.json").write_text(json.dumps(found.to_dict(), indent=2), encoding="utf-8")
        return found


def validate_evaluation(
    command: str | None,
    stream: str | None,
    paths: Sequence[Path],
    *,
    max_drop: float = 0.0,
    lower_is_better: bool = False,
) -> None:
    """Refuse a command without the placeholder, several adapters for it, and bounds without scores."""
    if not math.isfinite(max_drop):
        raise ValueError(f"--max-drop is {max_drop}: give a number, in the unit of the score")
    if command is not None and stream is not None:
        raise ValueError(f"--evaluate and --stream {stream} both score the adapter: give one of them")
    if command is None and stream is None and max_drop != 0:
        raise ValueError("--max-drop is for scores: give --evaluate with the command that prints them, or --stream")
    if command is None and lower_is_better:
        raise ValueError("--lower-is-better is for scores of --evaluate; those of --stream are percentages")
    if command is None:
        return
    if PLACEHOLDER not in command:
        raise ValueError(f"--evaluate {command!r} has no {PLACEHOLDER}: write it where the folder's path belongs")
    if len(paths) > 1:
        raise ValueError(f"--evaluate compares one adapter with its change, {len(paths)} paths are given")


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


def close_gate(evaluation: Verdict | None) -> None:
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
