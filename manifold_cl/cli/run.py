"""``manifold-cl run``: methods over a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, SpinnerColumn, TimeElapsedColumn

from manifold_cl.cli.runs_table import print_runs
from manifold_cl.cli.screen import Words, bars, check_device, check_out, screen
from manifold_cl.continual import METHODS, ContinualRunner, RunRecord, Training, make_method
from manifold_cl.continual import runner as running
from manifold_cl.streams import open_stream

DEFAULT_METHODS = ("sequential_merge", "eblora")


def run(
    method: Annotated[
        list[str] | None, typer.Option(help="Method to run; repeat for several, one after the other.")
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Stream of tasks (default: text-six).")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the stream to learn, by name with commas, in this order.")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Training examples a task.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random in the run.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the methods that have it: name=value.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records' figures as JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The small stream text-three: minutes, no claims.")] = False,
) -> None:
    """Learn a stream of tasks with each method, then print the comparison and write the report.

    The archives of a text stream are downloaded on first use, 160 MB in all, and kept.
    """
    if quick and stream not in (None, "text-three"):
        raise ValueError(f"--quick means --stream text-three, got --stream {stream}: give one of the two")
    check_device(device)
    check_out(out)
    names = list(dict.fromkeys(method or DEFAULT_METHODS))
    methods = [make_method(name, **given) for name, given in _options(set_ or [], names).items()]
    chosen = open_stream(  # after everything that can be wrong without it: it may download
        "text-three" if quick else (stream or "text-six"),
        tasks=[name.strip() for name in tasks.split(",")] if tasks else None,
        examples=examples,
    )
    runners = [
        ContinualRunner(
            chosen,
            one,
            out / f"{chosen.name}-{one.name}-seed{seed}",
            training=Training(seed=seed),
            device=device,
            details={"examples": chosen.tasks[0].size("train")},
        )
        for one in methods
    ]
    for one in runners:
        one.validate(resume=resume)  # all of them before the first minute is spent
    records = []
    for one in runners:
        with display(one.method.name) as show:
            one.on_progress = show
            records.append(one.run(resume=resume))
    finish([one.folder for one in runners], records, out, as_json=as_json)


@contextmanager
def display(method: str) -> Iterator[Any]:
    """A progress bar on a terminal; nothing elsewhere but the log's line a task."""
    columns = (
        SpinnerColumn(),
        Words("{task.description}", "bold"),
        BarColumn(),
        TimeElapsedColumn(),
        Words("{task.fields[note]}"),
    )
    with bars(*columns) as progress:
        bar = progress.add_task(method, total=None, note="")

        def show(state: running.Progress) -> None:
            count = f" {state.step}/{state.steps}" if state.steps else ""
            loss = f", loss {state.loss:.3f}" if state.phase == "train" and state.step else ""
            progress.update(
                bar,
                description=f"{method} {state.index + 1}/{state.tasks} {state.task}",
                total=state.steps or 1,
                completed=state.step,
                note=f"{state.phase}{count}{loss}",
            )

        yield show


def finish(folders: Sequence[Path], records: Sequence[RunRecord], out: Path, *, as_json: bool) -> None:
    """Print the figures and write the report."""
    from manifold_cl.cli.analysis_package import write_report

    print_runs(records, as_json=as_json)
    stem = f"{records[0].stream}-seed{records[0].config['seed']}"
    report = write_report(out / f"report-{stem}.html", [str(folder) for folder in folders])
    screen.say(f"report: {report}")


def _options(given: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The ``name=value`` pairs, each for the methods that have such an option; one that none has is an error."""
    chosen: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        takers = [m for m in methods if m in METHODS and name in {f.name for f in fields(METHODS[m]) if f.init}]  # type: ignore[arg-type]
        for taker in takers or methods[:1]:  # where nobody takes it, make_method names the nearest options
            chosen[taker][name] = value
    return chosen
