"""``manifold-cl streams``: folders of the user, text or published benchmarks of images, checked and run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from manifold_cl import continual
from manifold_cl import streams as library
from manifold_cl.cli.options import (
    Commands,
    Examples,
    Json,
    Resume,
    RunsFolder,
    Seed,
    Tasks,
    at_least,
    require_path,
    split_names,
    validate_device,
    validate_out,
)
from manifold_cl.cli.run import DEFAULT_METHODS, finish, learn
from manifold_cl.cli.screen import output, print_table, screen
from manifold_cl.cli.text_streams import LAYOUTS, RunSettings, check_texts, run_texts, text_layout
from manifold_cl.streams.published import DEFAULT_MODEL, PUBLISHED

if TYPE_CHECKING:
    from manifold_cl.streams import FolderOptions, Layout, TaskReport

INCOMPLETE = 2
"""Exit code of ``streams check`` for an incomplete folder."""
Folder = Annotated[Path, Argument(help="Folder with the data.")]
Benchmark = Annotated[str, Option(help=f"Name of the benchmark: {' or '.join(PUBLISHED)}.")]
LayoutFile = Annotated[Path | None, Option(help="Layout file to use instead of the published one.")]
AnyBenchmark = Annotated[
    str | None, Option(help=f"Benchmark of images: {' or '.join(PUBLISHED)} (default: ucit, where no text is found).")
]
AnyLayout = Annotated[
    str | None,
    Option(
        metavar="NAME|FILE",
        help=f"Layout of text ({', '.join(LAYOUTS)}; default: found by the files), or a layout file for images.",
    ),
]
Order = Annotated[str | None, Option(metavar="N", help="Published order of the tasks, for trace, olora and superni.")]
Model = Annotated[
    str | None, Option(help=f"A folder, or a model on the hub; for images a LLaVA model (default: {DEFAULT_MODEL}).")
]
Method = Annotated[
    list[str] | None,
    Option(metavar="NAME", help=f"Text: method to run; repeatable (default: {' and '.join(DEFAULT_METHODS)})."),
]
Set = Annotated[list[str] | None, Option("--set", metavar="NAME=VALUE", help="Text: option of a method; repeatable.")]
TestExamples = Annotated[int | None, Option(callback=at_least(1), help="Test examples per task (default: all).")]
Epochs = Annotated[int | None, Option(metavar="N", min=1, help="Text: passes over the training examples (default: 1).")]
General = Annotated[
    list[Path] | None, Option(metavar="FILE", help="Text: JSONL that is evaluated and never trained; repeatable.")
]
ScoredBy = Annotated[str | None, Option(help="Text: generation, likelihood or loss.")]
MaxLength = Annotated[int | None, Option(callback=at_least(1), help="Text: tokens of prompt and answer together.")]
MaxNewTokens = Annotated[int | None, Option(callback=at_least(1), help="Text: tokens after which an answer ends.")]
PresetName = Annotated[
    list[str] | None, Option(metavar="NAME", help="Images: published configuration to run; repeatable.")
]
TrainProjector = Annotated[
    bool, Option("--train-projector", help="Images: train the projector too, without protection, as published.")
]
BatchSize = Annotated[int | None, Option(callback=at_least(1), help="Examples per process and forward pass.")]
AnyDevice = Annotated[str | None, Option(help="Device to compute on, such as cpu or cuda.")]
Dtype = Annotated[str | None, Option(help="Precision of the frozen weights (default: bfloat16; for text float32).")]
MergedDtype = Annotated[str, Option(help="Precision of the weights that updates merge into.")]
Checkpointing = Annotated[bool, Option("--checkpointing", help="Recompute activations: slower, but much less memory.")]
DEFAULT_STREAM = "ucit"

commands = Commands(
    name="streams",
    help="Folders of your own, text or benchmarks of images: verify their data, and run methods on them.",
)


@commands.command()
def check(
    folder: Folder,
    stream: AnyBenchmark = None,
    layout: AnyLayout = None,
    order: Order = None,
    tasks: Tasks = None,
    as_json: Json = False,
) -> None:
    """List what is missing from a folder, what is damaged in it, and where each file belongs.

    The exit code is 2 if anything is missing or damaged.
    """
    require_path(folder, f"a folder; create it, and put the data of {stream or DEFAULT_STREAM} there")
    if text := _text_layout(folder, stream, layout):
        if not check_texts(folder, text, order=order, tasks=split_names(tasks), as_json=as_json):
            raise typer.Exit(INCOMPLETE)
        return
    _refuse("a benchmark of images", order=order, tasks=tasks)
    chosen = _visual_layout(stream, layout)
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
    model: Model = None,
    method: Method = None,
    set_: Set = None,
    layout: AnyLayout = None,
    order: Order = None,
    tasks: Tasks = None,
    examples: Examples = None,
    test_examples: TestExamples = None,
    epochs: Epochs = None,
    general: General = None,
    score_by: ScoredBy = None,
    max_length: MaxLength = None,
    max_new_tokens: MaxNewTokens = None,
    stream: AnyBenchmark = None,
    preset: PresetName = None,
    train_projector: TrainProjector = False,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: AnyDevice = None,
    dtype: Dtype = None,
    merged_dtype: MergedDtype = "float32",
    checkpointing: Checkpointing = False,
    out: RunsFolder = Path("runs"),
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run methods on a folder of text, or published configurations on images; compare them, and write a report.

    The device is cuda by default, for text cpu where there is no cuda. Under torchrun or accelerate launch, the
    processes share the work of every step; the total batch of a published configuration stays.
    """
    require_path(folder, f"the folder of {stream or DEFAULT_STREAM}, which 'manifold-cl streams check FOLDER' verifies")
    validate_out(out)
    shared: dict[str, Any] = {"examples": examples, "test_examples": test_examples, "merged_dtype": merged_dtype}
    shared |= {"checkpointing": checkpointing, "tasks": split_names(tasks)}
    texts: dict[str, Any] = {"order": order, "general": general, "score_by": score_by, "max_length": max_length}
    texts |= {"max_new_tokens": max_new_tokens}
    kind = RunSettings(seed, batch_size, device, out, resume, as_json)
    if text := _text_layout(folder, stream, layout):
        _refuse("a folder of text", preset=preset, train_projector=train_projector or None)
        if model is None:
            raise ValueError("--model is needed for a folder of text: a folder, or the name of a model on the hub")
        given = {**shared, **texts, "general": general or (), "dtype": dtype or "float32"}
        options = library.LanguageOptions(model=model, layout=text, **given)
        run_texts(folder, options, kind, methods=method or (), settings=set_ or (), epochs=epochs or 1)
        return
    _refuse("a benchmark of images", method=method, set=set_, epochs=epochs, **texts)
    visual = library.FolderOptions(model=model or DEFAULT_MODEL, dtype=dtype or "bfloat16", **shared)
    presets = preset or ["published"]
    _run_presets(folder, _visual_layout(stream, layout), visual, kind, presets, train_projector=train_projector)


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


def _run_presets(
    folder: Path,
    layout: Layout,
    options: FolderOptions,
    settings: RunSettings,
    names: Sequence[str],
    *,
    train_projector: bool,
) -> None:
    from manifold_cl.continual.ranks import process_group

    presets = {name: layout.preset(name, tasks=options.tasks) for name in names}
    device, seed = settings.device or "cuda", settings.seed
    details = {key: getattr(options, key) for key in ("examples", "test_examples", "model")}
    with process_group(device) as ranks:
        validate_device(device)
        runners = {}
        for name, one in presets.items():
            projector = one.additional_parameters() if train_projector else False
            runners[name] = continual.ContinualRunner(
                library.open_folder(folder, layout, replace(options, train_projector=projector)),
                continual.make_method(one.method, **one.options),
                settings.out / f"{layout.name}-{name}-seed{seed}",
                training=one.training_for(ranks.count, batch_size=settings.batch_size, seed=seed),
                device=device,
                details={"preset": name, **details},
            )
        records = learn(runners, resume=settings.resume, show=ranks.writes)
        if ranks.writes:
            finish(runners, records, settings.out, as_json=settings.as_json)


def _text_layout(folder: Path, stream: str | None, layout: str | None) -> str | None:
    """The layout of text to read the folder with; None for a benchmark of images."""
    if stream is not None:
        if layout in LAYOUTS:
            raise ValueError(f"--stream {stream} is a benchmark of images, --layout {layout} one of text: give one")
        return None
    found = text_layout(folder, layout)
    if found is None and layout is None:
        screen.say((f"no text is found in {folder}: read as {DEFAULT_STREAM}; --layout or --stream choose", "dim"))
    return found


def _visual_layout(stream: str | None, layout: str | None) -> Layout:
    if layout is None:
        return library.published_layout(stream or DEFAULT_STREAM)
    if not Path(layout).exists():
        raise ValueError(f"--layout is a file, or one of {', '.join(LAYOUTS)}, got {layout!r}")
    return library.read_layout(Path(layout))


def _layout(stream: str, layout: Path | None) -> Layout:
    return library.published_layout(stream) if layout is None else library.read_layout(layout)


def _refuse(kind: str, **options: object) -> None:
    """Refuse options that have no effect on a kind of folder."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} has no effect on {kind}: leave it out")


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
