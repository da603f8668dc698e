"""``manifold-cl streams``: benchmarks that the user downloads, checked and run as published."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from manifold_cl import continual
from manifold_cl import streams as library
from manifold_cl.cli.options import (
    Commands,
    Device,
    Examples,
    Json,
    Resume,
    RunsFolder,
    Seed,
    Tasks,
    require_path,
    split_names,
    validate_device,
)
from manifold_cl.cli.run import finish, learn
from manifold_cl.cli.screen import output, print_table, screen
from manifold_cl.streams.published import DEFAULT_MODEL, PUBLISHED

if TYPE_CHECKING:
    from manifold_cl.streams import Layout, TaskReport

INCOMPLETE = 2
"""Exit code of ``streams check`` for an incomplete folder."""
Folder = Annotated[Path, Argument(help="Folder with the downloaded data.")]
Benchmark = Annotated[str, Option(help=f"Name of the benchmark: {' or '.join(PUBLISHED)}.")]
LayoutFile = Annotated[Path | None, Option(help="Layout file to use instead of the published one.")]

commands = Commands(
    name="streams", help="Benchmarks whose data you download: verify the data, run published configurations."
)


@commands.command()
def check(folder: Folder, stream: Benchmark = "ucit", layout: LayoutFile = None, as_json: Json = False) -> None:
    """List what is missing from a downloaded folder, what is damaged in it, and where each file belongs.

    The exit code is 2 if anything is missing or damaged.
    """
    require_path(folder, f"a folder; create it, and put the data of {stream} there")
    chosen = _layout(stream, layout)
    reports = library.verify_folder(folder, chosen)
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=1))
    else:
        _print(reports, chosen, folder)
    if not all(report.complete for report in reports):
        raise typer.Exit(INCOMPLETE)


@commands.command()
def run(
    folder: Folder,
    stream: Benchmark = "ucit",
    model: Annotated[
        str, Option(help="LLaVA model: a folder, or a checkpoint on the hub, downloaded on first use.")
    ] = DEFAULT_MODEL,
    preset: Annotated[
        list[str] | None, Option(metavar="NAME", help="Published configuration to run; repeatable.")
    ] = None,
    tasks: Tasks = None,
    examples: Examples = None,
    test_examples: Annotated[int | None, Option(help="Test examples per task (default: all).")] = None,
    batch_size: Annotated[int | None, Option(help="Examples per process and forward pass.")] = None,
    seed: Seed = 0,
    device: Device = "cuda",
    dtype: Annotated[str, Option(help="Precision of the frozen weights.")] = "bfloat16",
    merged_dtype: Annotated[str, Option(help="Precision of the weights that updates merge into.")] = "float32",
    train_projector: Annotated[
        bool, Option("--train-projector", help="Train the projector too, without protection, as published.")
    ] = False,
    checkpointing: Annotated[
        bool, Option("--checkpointing", help="Recompute activations: slower, but much less memory.")
    ] = False,
    layout: LayoutFile = None,
    out: RunsFolder = Path("runs"),
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run published configurations on a downloaded stream, compare them, and write a report.

    Under torchrun or accelerate launch, the processes share the work of every step; the total batch stays as published.
    """
    from manifold_cl.continual.ranks import process_group

    require_path(folder, f"the folder of {stream}, which 'manifold-cl streams check FOLDER' verifies")
    chosen = _layout(stream, layout)
    names = split_names(tasks)
    presets = {name: chosen.preset(name, tasks=names) for name in preset or ("published",)}
    options = library.FolderOptions(
        model=model,
        dtype=dtype,
        merged_dtype=merged_dtype,
        tasks=names,
        examples=examples,
        test_examples=test_examples,
        checkpointing=checkpointing,
    )
    with process_group(device) as ranks:
        validate_device(device)
        runners = {}
        for name, one in presets.items():
            projector = one.additional_parameters() if train_projector else False
            runners[name] = continual.ContinualRunner(
                library.open_folder(folder, chosen, replace(options, train_projector=projector)),
                continual.make_method(one.method, **one.options),
                out / f"{chosen.name}-{name}-seed{seed}",
                training=one.training_for(ranks.count, batch_size=batch_size, seed=seed),
                device=device,
                details={"preset": name, "examples": examples, "test_examples": test_examples, "model": model},
            )
        records = learn(runners, resume=resume, show=ranks.writes)
        if ranks.writes:
            finish(runners, records, out, as_json=as_json)


@commands.command()
def presets(stream: Benchmark = "ucit", layout: LayoutFile = None, as_json: Json = False) -> None:
    """Show the published configurations of a stream, and how they deviate from the publication."""
    chosen = _layout(stream, layout)
    if as_json:
        print(json.dumps({name: asdict(preset) for name, preset in chosen.presets.items()}, indent=1))
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, preset in chosen.presets.items():
        table.add_row(screen.styled((name, "bold")), f"{preset.method}, {preset.total_batch} examples per step")
        for part, values in (("options", preset.options), ("training", preset.training)):
            table.add_row(part, ", ".join(f"{key}={value}" for key, value in values.items()))
        if preset.projector is not None:
            rates = f"lr={preset.projector.lr}, weight_decay={preset.projector.weight_decay}"
            table.add_row("projector", f"{rates} (only with --train-projector)")
        for deviation in preset.deviations:
            table.add_row("deviation", deviation)
        table.add_row("", "")
    output(120).print(table)


@commands.command(name="layout")
def show_layout(stream: Benchmark = "ucit") -> None:
    """Print the layout file of a stream. Edit it where your copy of the data differs, and pass it with --layout."""
    from manifold_cl.streams.layout import published_text

    print(published_text(stream), end="")


def _layout(stream: str, layout: Path | None) -> Layout:
    return library.published_layout(stream) if layout is None else library.read_layout(layout)


def _print(reports: list[TaskReport], layout: Layout, folder: Path) -> None:
    parts = ("train", "test", "captions")
    rows: list[tuple[str | Text, ...]] = []
    for report in reports:
        counts = {file.part: str(file.items) if file.found else "missing" for file in report.files}
        images = f"{report.images - len(report.missing_images)} of {report.images}" if report.images else "–"
        state = Text("complete", "green") if report.complete else Text("incomplete", "red")
        rows.append((report.task, *(counts.get(part, "–") for part in parts), images, state))
    print_table(f"{layout.name} in {folder}", ("task", *parts, "images", ""), rows)
    for report in reports:
        problems = [problem for file in report.files for problem in file.problems]
        for problem in [*problems, *([report.image_problem] if report.image_problem else [])]:
            screen.say((report.task, "bold"), f"  {problem}")
