"""``manifold-cl run``: methods on a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from manifold_cl import continual
from manifold_cl.cli.durations import expected_seconds, in_words, measured
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
from manifold_cl.cli.progress import show_runs
from manifold_cl.cli.runs_table import print_runs
from manifold_cl.cli.screen import Screen, screen
from manifold_cl.continual import METHODS
from manifold_cl.plugins import Registry, unknown
from manifold_cl.streams import STREAMS
from manifold_cl.streams.registry import is_code

if TYPE_CHECKING:
    from manifold_cl.continual import ContinualRunner, RunRecord

DEFAULT_METHODS = ("sequential_merge", "eblora")
DEFAULT_STREAM, QUICK_STREAM = "text-six", "text-three"
QUICK = {DEFAULT_STREAM: QUICK_STREAM, "lm-four": "lm-two", "vlm-three": "vlm-two"}
"""Stream → its small form for a first look."""
SMALL = ", ".join(f"{short} for {name}" for name, short in QUICK.items())
OF_TRAINING = {
    "epochs": "give --epochs",
    "seed": "give --seed",
    **dict.fromkeys(("batch_size", "warmup"), "set it in the table [training] of a study (manifold-cl study)"),
}


def _time(stream: str) -> str:
    """Expected time of the default methods on a stream, in words."""
    seconds = expected_seconds(stream, DEFAULT_METHODS)
    assert seconds is not None  # measured for both streams of the help
    return in_words(seconds)


FIRST_STEPS = (
    f"A first look takes about {_time(QUICK_STREAM)}: [bold]manifold-cl run --quick[/bold] trains plain LoRA and "
    "EBLoRA on three tasks, and writes a table and a report. [bold]manifold-cl COMMAND --help[/bold] lists the options "
    "of a command."
)
HELP = f"""Run methods on a stream of tasks, compare them, and write a report.

By default, plain LoRA (sequential_merge) and EBLoRA (eblora) learn the six tasks of {DEFAULT_STREAM}. This takes about
{_time(DEFAULT_STREAM)} on {measured()["machine"]}; with --quick, about {_time(QUICK_STREAM)}. The first use of a text
stream downloads its archives, 156 MB in all, and keeps them. Finished tasks are kept: after an interruption, --resume
continues.

[bold]Methods:[/bold] {", ".join(sorted(METHODS))}. [bold]manifold-cl info[/bold] lists their options.

[bold]Examples:[/bold]
    manifold-cl run --quick
    manifold-cl run --method eblora --method olora
    manifold-cl run --set energy=0.95 --seed 1 --out runs"""


def run(
    method: Annotated[
        list[str] | None,
        Option(metavar="NAME", help=f"Method to run; repeatable (default: {' and '.join(DEFAULT_METHODS)})."),
    ] = None,
    stream: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"Stream of tasks, such as {', '.join(QUICK)} (manifold-cl info lists them), or your own as "
            f"file.py:function (default: {DEFAULT_STREAM}).",
        ),
    ] = None,
    tasks: Tasks = None,
    examples: Examples = None,
    epochs: Annotated[
        int, Option("--epochs", metavar="N", min=1, help="Passes over the training examples of each task.")
    ] = 1,
    seed: Seed = 0,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="NAME=VALUE", help="Option of a method; repeatable.")
    ] = None,
    device: Device = "cpu",
    out: RunsFolder = Path("runs"),
    resume: Resume = False,
    as_json: Json = False,
    quick: Annotated[
        bool,
        Option(
            "--quick",
            help=f"Use a small stream for a first look: {SMALL}.",
        ),
    ] = False,
) -> None:
    """Run methods on a stream of tasks, compare them, and write a report."""
    name = stream or DEFAULT_STREAM
    if quick and name not in (*QUICK, *QUICK.values()):
        raise ValueError(f"--quick means {SMALL}, got --stream {stream}: give one of the two")
    name = QUICK.get(name, name) if quick else name
    names = list(dict.fromkeys(method or DEFAULT_METHODS))
    validate_out(out)
    expected = announce(name, names, tasks=split_names(tasks), examples=examples, epochs=epochs)
    from manifold_cl.streams.user_streams import open_named  # loads torch, so after the first line

    validate_device(device)
    methods = [continual.make_method(one, **options) for one, options in method_options(set_ or [], names).items()]
    # After all other validation, since this may download.
    chosen = open_named(name, split_names(tasks), examples, code_folder=Path())
    runners = {
        one.name: continual.ContinualRunner(
            chosen,
            one,
            out / f"{chosen.name}-{one.name}-seed{seed}",
            training=continual.Training(seed=seed, epochs=epochs),
            device=device,
            details={"examples": chosen.tasks[0].size("train")},
        )
        for one in methods
    }
    finish(runners, learn(runners, resume=resume, expected=expected), out, as_json=as_json)


def announce(
    stream: str,
    methods: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    examples: int | None = None,
    epochs: int = 1,
) -> dict[str, float]:
    """Print what will run and about how long, before torch is loaded; expected seconds by method, if known.

    Raises:
        ValueError: an unknown stream or method.
    """
    names: list[tuple[Registry[Any], str]] = [(METHODS, name) for name in methods]
    if not is_code(stream):
        names.append((STREAMS, stream))
    for registry, name in names:
        if name not in list(registry):  # the names alone: an entry would load torch
            raise ValueError(registry.unknown(name))
    count = None if tasks is None else len(tasks)
    each = {name: expected_seconds(stream, [name], tasks=count, examples=examples) for name in methods}
    known = {name: epochs * seconds for name, seconds in each.items() if seconds is not None}
    what = f"{stream}{'' if tasks is None else ' (' + ', '.join(tasks) + ')'}: {', '.join(methods)}"
    if len(known) < len(methods):
        screen.say(f"{what}; the time is not known yet")
        return {}
    screen.say(f"{what}; about {in_words(sum(known.values()))} on {measured()['machine']}")
    return known


def learn(
    runners: Mapping[str, ContinualRunner],
    *,
    resume: bool,
    show: bool = True,
    expected: Mapping[str, float] | None = None,
) -> list[RunRecord]:
    """The records of all runs, one after the other; ``show`` displays their progress, ``expected`` are seconds."""
    for runner in runners.values():
        runner.validate(resume=resume)  # all of them, before the first one takes time
    if not show:
        return [runner.run(resume=resume) for runner in runners.values()]
    records = []
    with show_runs(expected or dict.fromkeys(runners, 1.0), sum(expected.values()) if expected else None) as display:
        for label, runner in runners.items():
            runner.on_progress = display.on_progress(label)
            records.append(runner.run(resume=resume))
            display.finish(label)
    return records


def finish(runners: Mapping[str, ContinualRunner], records: Sequence[RunRecord], out: Path, *, as_json: bool) -> None:
    """Print the figures of the runs and write the report."""
    from manifold_cl.cli.analysis_package import analysis

    print_runs(records, as_json=as_json)
    stem = f"{records[0].stream}-seed{records[0].config['seed']}"
    report = analysis.write_report(out / f"report-{stem}.html", [str(runner.folder) for runner in runners.values()])
    (screen if as_json else Screen()).say(f"report: {report}")


def method_options(pairs: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method → its options among the ``name=value`` pairs; ValueError for one that no method has."""
    from manifold_cl.continual.methods.registry import option_names

    options: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        having = [method for method in methods if name in option_names(method)]
        if not having and name in OF_TRAINING:
            raise ValueError(f"{name} is an option of training, not of a method: {OF_TRAINING[name]}")
        if not having:
            every = dict.fromkeys(each for method in methods for each in option_names(method))
            raise ValueError(unknown(f"option of {' and '.join(methods)}", name, every))
        for method in having:
            options[method][name] = value
    return options
