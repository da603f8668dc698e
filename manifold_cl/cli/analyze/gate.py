"""The gate of a changed adapter: its scores before and after, by a command or on a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from typer import Option

from manifold_cl.cli.analyze.evaluation import PLACEHOLDER, evaluated
from manifold_cl.cli.analyze.stream_evaluation import evaluate_on, opened
from manifold_cl.cli.options import GATE_CLOSED
from manifold_cl.cli.screen import screen

if TYPE_CHECKING:
    from manifold_cl.cli.analysis_package import analysis
    from manifold_cl.continual import TaskStream

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
            self._stream = opened(stream, model)

    def model_for(self, data: Sequence[str] | None) -> str | None:
        """The ``--model`` that belongs to ``--data``: None where it is given for a folder of text alone."""
        if self._stream is not None and self._model is not None and not self._reads_model and not data:
            raise ValueError(
                f"--stream {self._stream.name} has a model of its own: leave out --model, or give --data for it too"
            )
        return None if self._reads_model and not data else self._model

    def __call__(self, before: analysis.AdapterSet, after: analysis.AdapterSet, folder: Path) -> Verdict | None:
        """The scores of both adapters, also written into the folder of the new one."""
        found: Verdict | None = None
        if self._stream is not None:
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


def close_gate(evaluation: Verdict | None) -> None:
    """Exit with code 3 after an evaluation that fails; nothing without one."""
    if evaluation is not None and not evaluation.passes:
        screen.say(("gate closed:", "bold red"), f" {evaluation.sentence}")
        raise SystemExit(GATE_CLOSED)
