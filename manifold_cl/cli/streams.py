"""``manifold-cl streams``: what a downloaded folder lacks, and how a benchmark was published."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from manifold_cl.cli.run import display, finish
from manifold_cl.cli.screen import Commands, check_device, output, screen
from manifold_cl.continual import ContinualRunner, make_method
from manifold_cl.continual.ranks import process_group
from manifold_cl.streams.folder_report import TaskReport, verify_folder
from manifold_cl.streams.folder_stream import DEFAULT_MODEL, FolderOptions, open_folder
from manifold_cl.streams.layout import PUBLISHED, Layout, published_layout, published_text, read_layout

INCOMPLETE = 2

streams = Commands(
    name="streams",
    no_args_is_help=True,
    help="Streams whose data you download: what is missing, and what was published.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@streams.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The folder with the downloaded data.")],
    stream: Annotated[str, typer.Option(help=f"Which stream it is: {' or '.join(PUBLISHED)}.")] = "ucit",
    layout: Annotated[Path | None, typer.Option(help="A layout file of your own instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Tell what is missing from a folder, what is broken in it, and where it belongs. Exit code 2 if anything is."""
    chosen = _layout(stream, layout)
    reports = verify_folder(folder, chosen)
    if as_json:
        print(json.dumps([report.plain() for report in reports], indent=1))
    else:
        _print(reports, chosen, folder)
    if not all(report.complete for report in reports):
        raise typer.Exit(INCOMPLETE)


@streams.command()
def run(
    folder: Annotated[Path, typer.Argument(help="The folder with the downloaded data.")],
    stream: Annotated[str, typer.Option(help=f"Which stream it is: {' or '.join(PUBLISHED)}.")] = "ucit",
    model: Annotated[
        str, typer.Option(help="LLaVA: a folder, or a checkpoint of the hub, which is downloaded on first use.")
    ] = DEFAULT_MODEL,
    preset: Annotated[list[str] | None, typer.Option(help="Configuration to run; repeat for several.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks to learn, by name with commas, in this order.")] = None,
    examples: Annotated[int | None, typer.Option(help="Training examples a task.")] = None,
    test_examples: Annotated[int | None, typer.Option(help="Test examples a task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a process and forward pass.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random in the run.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs: cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Precision of the frozen weights.")] = "bfloat16",
    merged_dtype: Annotated[str, typer.Option(help="Precision of the weights that updates merge into.")] = "float32",
    train_projector: Annotated[
        bool, typer.Option("--train-projector", help="Train the projector too, unprotected, as published.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations: slower, much less memory.")
    ] = False,
    layout: Annotated[Path | None, typer.Option(help="A layout file of your own instead.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records' figures as JSON.")] = False,
) -> None:
    """Learn the stream with published configurations, then print the comparison and write the report.

    Under torchrun or accelerate launch all processes share the work of every step; the total batch stays as published.
    """
    chosen = _layout(stream, layout)
    names = [name.strip() for name in tasks.split(",")] if tasks else None
    given = {name: chosen.preset(name, tasks=names) for name in preset or ("published",)}
    with process_group(device) as ranks:
        check_device(device)
        runners = []
        for name, one in given.items():
            options = FolderOptions(
                model=model,
                dtype=dtype,
                merged_dtype=merged_dtype,
                tasks=names,
                examples=examples,
                test_examples=test_examples,
                train_projector=one.additional_parameters() if train_projector else False,
                checkpointing=checkpointing,
            )
            runners.append(
                ContinualRunner(
                    open_folder(folder, chosen, options),
                    make_method(one.method, **one.options),
                    out / f"{chosen.name}-{name}-seed{seed}",
                    training=one.training_for(ranks.count, batch_size=batch_size, seed=seed),
                    device=device,
                    details={"preset": name, "examples": examples, "test_examples": test_examples, "model": model},
                )
            )
        for runner in runners:
            runner.validate(resume=resume)  # all of them before the first hour is spent
        records = []
        for name, runner in zip(given, runners, strict=True):
            with display(name) as show:
                runner.on_progress = show if ranks.writes else None
                records.append(runner.run(resume=resume))
        if ranks.writes:
            finish([runner.folder for runner in runners], records, out, as_json=as_json)


@streams.command()
def presets(
    stream: Annotated[str, typer.Option(help=f"Which stream: {' or '.join(PUBLISHED)}.")] = "ucit",
    layout: Annotated[Path | None, typer.Option(help="A layout file of your own instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """Show the published configurations of a stream, and in what they differ from the publication."""
    chosen = _layout(stream, layout)
    if as_json:
        print(json.dumps({name: asdict(preset) for name, preset in chosen.presets.items()}, indent=1))
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, preset in chosen.presets.items():
        table.add_row(screen.styled((name, "bold")), f"{preset.method}, {preset.total_batch} examples a step")
        for part, values in (("options", preset.options), ("training", preset.training)):
            table.add_row(part, ", ".join(f"{key}={value}" for key, value in values.items()))
        if preset.projector is not None:
            rates = f"lr={preset.projector.lr}, weight_decay={preset.projector.weight_decay}"
            table.add_row("projector", f"{rates} (only with --train-projector)")
        for deviation in preset.deviations:
            table.add_row("deviation", deviation)
        table.add_row("", "")
    output(120).print(table)


@streams.command(name="layout")
def show_layout(
    stream: Annotated[str, typer.Option(help=f"Which stream: {' or '.join(PUBLISHED)}.")] = "ucit",
) -> None:
    """Print the layout file of a stream, to correct where your copy of the data differs: pass it with --layout."""
    print(published_text(stream), end="")


def _layout(stream: str, layout: Path | None) -> Layout:
    return published_layout(stream) if layout is None else read_layout(layout)


def _print(reports: list[TaskReport], layout: Layout, folder: Path) -> None:
    table = Table(title=f"{layout.name} in {folder}", title_justify="left")
    for column in ("task", "train", "test", "captions", "images", ""):
        table.add_column(column, justify="left" if column in ("task", "") else "right")
    for report in reports:
        counts = {file.part: str(file.items) if file.found else "missing" for file in report.files}
        have = report.images - len(report.missing_images)
        table.add_row(
            report.task,
            *(counts.get(part, "–") for part in ("train", "test", "captions")),
            f"{have} of {report.images}" if report.images else "–",
            Text("complete", "green") if report.complete else Text("incomplete", "red"),
        )
    output(120).print(table)
    for report in reports:
        said = [problem for file in report.files for problem in file.problems]
        for problem in [*said, *([report.image_problem] if report.image_problem else [])]:
            screen.say((report.task, "bold"), f"  {problem}")
