"""``manifold-cl run``: methods on a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from manifold_cl.cli.options import (
    Device,
    Examples,
    Json,
    Resume,
    RunsFolder,
    Seed,
    Tasks,
    split_names,
    validate_device,
    validate_out,
)
from manifold_cl.cli.runs_table import print_runs
from manifold_cl.cli.screen import bars, screen
from manifold_cl.continual import METHODS, ContinualRunner, Method, RunRecord, Training, make_method
from manifold_cl.continual import runner as running
from manifold_cl.streams.user_streams import open_named

DEFAULT_METHODS = ("sequential_merge", "eblora")


def run(
    method: Annotated[list[str] | None, Option(help="Method to run; repeat the option for several.")] = None,
    stream: Annotated[
        str | None, Option(help="Name of the stream of tasks (default: text-six), or your own as file.py:function.")
    ] = None,
    tasks: Tasks = None,
    examples: Examples = None,
    seed: Seed = 0,
    set_: Annotated[list[str] | None, Option("--set", help="Option of a method, as name=value; repeatable.")] = None,
    device: Device = "cpu",
    out: RunsFolder = Path("runs"),
    resume: Resume = False,
    as_json: Json = False,
    quick: Annotated[bool, Option("--quick", help="Use the small stream text-three, for a first look.")] = False,
) -> None:
    """Run methods on a stream of tasks, compare them, and write a report.

    The first use of a text stream downloads its archives, 156 MB in all, and keeps them.
    """
    if quick and stream not in (None, "text-three"):
        raise ValueError(f"--quick means --stream text-three, got --stream {stream}: give one of the two")
    validate_device(device)
    validate_out(out)
    names = list(dict.fromkeys(method or DEFAULT_METHODS))
    methods = [_method(name, options) for name, options in _method_options(set_ or [], names).items()]
    # After all other validation, since this may download.
    name = "text-three" if quick else (stream or "text-six")
    chosen = open_named(name, split_names(tasks), examples, code_folder=Path())
    runners = {
        one.name: ContinualRunner(
            chosen,
            one,
            out / f"{chosen.name}-{one.name}-seed{seed}",
            training=Training(seed=seed),
            device=device,
            details={"examples": chosen.tasks[0].size("train")},
        )
        for one in methods
    }
    finish(runners, learn(runners, resume=resume), out, as_json=as_json)


def learn(runners: Mapping[str, ContinualRunner], *, resume: bool, show: bool = True) -> list[RunRecord]:
    """The records of all runs, one after the other, with a progress bar each if ``show``."""
    for runner in runners.values():
        runner.validate(resume=resume)  # all of them, before the first one takes time
    records = []
    for label, runner in runners.items():
        with _progress(label) as on_progress:
            runner.on_progress = on_progress if show else None
            records.append(runner.run(resume=resume))
    return records


def finish(runners: Mapping[str, ContinualRunner], records: Sequence[RunRecord], out: Path, *, as_json: bool) -> None:
    """Print the figures of the runs and write the report."""
    from manifold_cl.cli.analysis_package import analysis

    print_runs(records, as_json=as_json)
    stem = f"{records[0].stream}-seed{records[0].config['seed']}"
    report = analysis.write_report(out / f"report-{stem}.html", [str(runner.folder) for runner in runners.values()])
    screen.say(f"report: {report}")


@contextmanager
def _progress(label: str) -> Iterator[Any]:
    with bars() as progress:
        bar = progress.add_task(label, total=None, note="")

        def on_progress(state: running.Progress) -> None:
            count = f" {state.step}/{state.steps}" if state.steps else ""
            loss = f", loss {state.loss:.3f}" if state.phase == "train" and state.step else ""
            progress.update(
                bar,
                description=f"{label} {state.index + 1}/{state.tasks} {state.task}",
                total=state.steps or 1,
                completed=state.step,
                note=f"{state.phase}{count}{loss}",
            )

        yield on_progress


def _method_options(pairs: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method → its options among the ``name=value`` pairs. A pair that no method has goes to the first method."""
    options: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        having = [m for m in methods if m in METHODS and name in {f.name for f in fields(METHODS[m]) if f.init}]  # type: ignore[arg-type]
        for method in having or methods[:1]:  # make_method then names the nearest options
            options[method][name] = value
    return options


def _method(name: str, options: dict[str, Any]) -> Method:
    """`make_method`, with the method's name in every error about its options."""
    try:
        return make_method(name, **options)
    except (TypeError, ValueError) as error:
        if name not in METHODS or name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from None
