"""Folders of tasks in text for ``manifold-cl streams``: their contents, and runs of causal language models on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from manifold_cl import continual
from manifold_cl import streams as library
from manifold_cl.cli.options import validate_device
from manifold_cl.cli.run import DEFAULT_METHODS, finish, learn, method_options
from manifold_cl.cli.screen import print_table, screen

if TYPE_CHECKING:
    from manifold_cl.streams import LanguageOptions, TaskReport

LAYOUTS = ("jsonl", "trace", "olora", "superni")
"""Names of the layouts of text."""
PARTS = ("train", "validation", "test")
SHOWN = 3
"""Problems of a file that are printed; the others are counted."""


@dataclass(frozen=True)
class RunSettings:
    """What every run takes besides the options of its stream."""

    seed: int
    batch_size: int | None
    device: str | None
    out: Path
    resume: bool
    as_json: bool


def text_layout(folder: Path, layout: str | None) -> str | None:
    """The name of the layout of text that the folder has; None where it has none, or ``layout`` is a file."""
    from manifold_cl.files import FileError
    from manifold_cl.streams.text_layouts import find_layout

    if layout is not None:
        return layout if layout in LAYOUTS else None
    try:
        return find_layout(folder)[0].name
    except FileError as error:
        if "several layouts" in str(error):
            raise
        return None


def check_texts(folder: Path, layout: str, *, order: str | None, tasks: Sequence[str] | None, as_json: bool) -> bool:
    """Print a report per task; whether all are complete."""
    reports = library.verify_texts(folder, layout, order=order, tasks=tasks)
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=1))
    else:
        _print(reports, f"{layout} in {folder}")
    return all(report.complete for report in reports)


def run_texts(
    folder: Path,
    options: LanguageOptions,
    run: RunSettings,
    *,
    methods: Sequence[str],
    settings: Sequence[str],
    epochs: int,
) -> None:
    """Run methods on the folder, compare them, and write a report."""
    from manifold_cl.continual.ranks import process_group

    device = run.device or _fastest()
    names = list(dict.fromkeys(methods or DEFAULT_METHODS))
    with process_group(device) as ranks:
        validate_device(device)
        made = [continual.make_method(m, **given) for m, given in method_options(settings, names).items()]
        stream = library.open_language_stream(folder, options)
        training: dict[str, Any] = {"seed": run.seed, "epochs": epochs, "evaluate_on": options.evaluate_on}
        if run.batch_size is not None:
            training["batch_size"] = run.batch_size
        details: Mapping[str, Any] = {
            key: getattr(options, key) for key in ("model", "examples", "test_examples", "score_by", "max_length")
        }
        runners = {
            method.name: continual.ContinualRunner(
                stream,
                method,
                run.out / f"{stream.name}-{method.name}-seed{run.seed}",
                training=continual.Training(**training),
                device=device,
                details=details,
            )
            for method in made
        }
        if ranks.writes:
            sizes = ", ".join(f"{task.name} ({task.size('train')})" for task in stream.tasks)
            screen.say(f"{stream.name}: {', '.join(runners)} on {options.model}, {device}; tasks: {sizes}")
        records = learn(runners, resume=run.resume, show=ranks.writes)
        if ranks.writes:
            finish(runners, records, run.out, as_json=run.as_json)


def _fastest() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print(reports: Sequence[TaskReport], title: str) -> None:
    rows: list[tuple[str | Text, ...]] = []
    for report in reports:
        counts = {file.part: str(file.items) if file.found else "missing" for file in report.files}
        state = Text("complete", "green") if report.complete else Text("incomplete", "red")
        rows.append((report.task, *(counts.get(part, "–") for part in PARTS), state))
    print_table(title, ("task", *PARTS, ""), rows, "rows per part; a missing test part is held out of training")
    for report in reports:
        for file in report.files:
            for problem in file.problems[:SHOWN]:
                screen.say((report.task, "bold"), f"  {problem}")
            if (more := len(file.problems) - SHOWN) > 0:
                screen.say((report.task, "bold"), f"  {more} more problems in {file.path}")
