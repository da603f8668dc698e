"""The gate of a changed adapter on a stream: the scores of its tasks with the adapter before and after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from manifold_cl.cli.analyze.evaluation import LEVEL, Evaluation, paired_evaluation
from manifold_cl.cli.analyze.reading import counting

if TYPE_CHECKING:
    from torch import nn

    from manifold_cl.cli.analysis_package import analysis
    from manifold_cl.continual import Task, TaskStream

EvaluateOn = Annotated[
    str | None,
    Option(
        "--stream",
        help="Stream whose test examples score the adapter before and after: a name, your own as file.py:function, or "
        "with --model a folder of text.",
    ),
]


@dataclass(frozen=True)
class StreamEvaluation:
    """One evaluation per task of a stream; it passes where every task passes."""

    stream: str
    tasks: dict[str, Evaluation]

    @property
    def passes(self) -> bool:
        """Whether the drop of every task is within its bound. Intervals are adjusted for the number of tasks."""
        return all(each.passes for each in self.tasks.values())

    @property
    def sentence(self) -> str:
        """The result in words, with the task whose upper end is highest."""
        task, worst = max(self.tasks.items(), key=lambda item: item[1].bound)
        failed = [name for name, each in self.tasks.items() if not each.passes]
        verdict = f"fails on {len(failed)} of {len(self.tasks)}" if failed else f"passes on all {len(self.tasks)}"
        text = f"stream {self.stream} {verdict} tasks; {task}: {worst.numbers}"
        blind = [name for name, each in self.tasks.items() if each.before <= each.max_drop]
        if blind:
            text += f"; {', '.join(blind)} cannot fail: the score before is at most the drop that is allowed"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain values per task, with ``passes``."""
        tasks = {name: each.to_dict() for name, each in self.tasks.items()}
        return {"stream": self.stream, "tasks": tasks, "passes": self.passes}


def opened(stream: str, model: str | None) -> TaskStream:
    """The stream of that name; for a folder its tasks in text, with the model.

    Raises:
        ValueError: a folder without a model, or an unknown name.
    """
    from manifold_cl.cli.analysis_package import analysis
    from manifold_cl.streams import STREAMS, LanguageOptions, open_language_stream
    from manifold_cl.streams.registry import is_code
    from manifold_cl.streams.user_streams import open_named

    if not Path(stream).is_dir():
        if not is_code(stream) and stream not in STREAMS:
            names = ", ".join(sorted(STREAMS))
            raise ValueError(f"--stream {stream} is no folder here, no file.py:function, and no stream ({names})")
        return open_named(stream, code_folder=Path())
    if model is None:
        raise ValueError(f"--stream {stream} is a folder of text: give --model, the model that was adapted")
    return open_language_stream(stream, LanguageOptions(model=analysis.formats.reachable_model(model)))


def evaluate_on(
    chosen: TaskStream,
    before: analysis.AdapterSet,
    after: analysis.AdapterSet,
    *,
    max_drop: float,
    device: str,
) -> StreamEvaluation:
    """The scores of every task's test examples, with all updates added to the stream's model, before and after.

    Examples are compared pair by pair where the score is a mean over them.
    """
    from manifold_cl.continual.finite_weights import validate_finite_weights

    network = chosen.make_model().to(device)
    validate_finite_weights(network)
    level = 1 - (1 - LEVEL) / len(chosen.tasks)
    pairs: list[list[list[float]]] = []
    with counting("scores") as count:
        total = 2 * len(chosen.tasks)
        for number, adapters in enumerate((before, after)):
            done = number * len(chosen.tasks)
            pairs.append(_scores(network, adapters, chosen.tasks, lambda k, done=done: count(done + k, total)))  # type: ignore[misc]
    evaluations = {
        task.name: paired_evaluation(first, second, max_drop=max_drop, level=level)
        for task, first, second in zip(chosen.tasks, *pairs, strict=True)
    }
    return StreamEvaluation(chosen.name, evaluations)


def _scores(
    network: nn.Module, adapters: analysis.AdapterSet, tasks: tuple[Task, ...], progress: Callable[[int], None]
) -> list[list[float]]:
    """Per task the score of every test example in percent, or the task's score alone."""
    from manifold_cl.cli.analysis_package import analysis

    found = []
    with ExitStack() as stack:
        added = stack.enter_context(analysis.activations.AddedUpdates(network, adapters).attached())
        added.count = len(adapters.tasks)
        for number, task in enumerate(tasks, start=1):
            each = task.example_scores(network, "test")
            found.append(list(each) if each is not None else [next(iter(task.scores(network, "test").values()))])
            progress(number)
    return found
