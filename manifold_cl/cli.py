"""The ``manifold-cl`` command: run methods over a stream, compare runs, look into adapters."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from manifold_cl import METHODS, RETRACTIONS, ContinualRunner, RunRecord, Training, __version__, make_method
from manifold_cl.continual import runner as running
from manifold_cl.continual.record import library_versions, machine
from manifold_cl.streams import STREAMS, FetchError, cache_dir, open_stream

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Geometry-first low-rank continual adaptation.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
screen = Console(stderr=True)
"""Everything meant for a person. Standard output is kept for what ``--json`` prints and for tables."""

DEFAULT_METHODS = ("sequential", "eblora")
FIGURES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")
BAD_INPUT = 2
INTERRUPTED = 130


@app.command()
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
    """Learn a stream of tasks with each method, then print the comparison and write the report."""
    if quick and stream not in (None, "text-three"):
        raise ValueError(f"--quick means --stream text-three, got --stream {stream}: give one of the two")
    _check_device(device)
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
        one.check(resume=resume)  # all of them before the first minute is spent
    records = []
    for one in runners:
        with _display(one.method.name) as show:
            one.on_progress = show
            records.append(one.run(resume=resume))
    _finish([one.folder for one in runners], records, out, as_json=as_json)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Print the figures of finished or unfinished runs beside each other."""
    records = [RunRecord.load(folder) for folder in runs]
    _print_figures(records, as_json=as_json)


@app.command()
def analyze(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or adapter folders in the order of their tasks.")],
    out: Annotated[Path, typer.Option(help="Where the report and the tables go.")] = Path("analysis-report"),
    device: Annotated[str, typer.Option(help="Where spectra are computed.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print where things were written as JSON.")] = False,
) -> None:
    """Spectra and interference of adapters (ours or PEFT LoRA): an HTML report and tidy CSV tables."""
    from analysis import AdapterSet, interference_table, spectrum_table, write_report

    _check_device(device)
    adapters = AdapterSet.load(*folders)
    out.mkdir(parents=True, exist_ok=True)
    written = {"report": out / "report.html", "spectra": out / "spectra.csv", "interference": out / "interference.csv"}
    spectrum_table(adapters, device=device).to_csv(written["spectra"], index=False)
    interference_table(adapters, device=device).to_csv(written["interference"], index=False)
    write_report(written["report"], folders, device=device)
    if as_json:
        print(json.dumps({name: str(path) for name, path in written.items()}))
        return
    for name, path in written.items():
        screen.print(f"{name:>12}  {path}", highlight=False)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """What is here: versions, machine, methods with their options, retractions, streams, the cache folder."""
    methods = {
        name: {f.name: f.default for f in fields(cls) if f.init}  # type: ignore[arg-type]
        for name, cls in sorted(METHODS.items())
    }
    orders = {
        name: {metric: order if math.isfinite(order) else "exact" for metric, order in rule.order.items()}
        for name, rule in sorted(RETRACTIONS.items())
    }
    content = {
        "version": __version__,
        "versions": library_versions(),
        "machine": machine(),
        "methods": methods,
        "retractions": orders,
        "streams": sorted(STREAMS),
        "cache": str(cache_dir()),
    }
    if as_json:
        print(json.dumps(content, indent=1))
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("version", __version__)
    table.add_row("libraries", ", ".join(f"{name} {version}" for name, version in library_versions().items()))
    table.add_row("machine", ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))
    for name, options in methods.items():
        said = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
        table.add_row(f"method {name}", said)
    for name, declared in orders.items():
        table.add_row(f"retraction {name}", ", ".join(f"order {q} ({metric})" for metric, q in declared.items()))
    table.add_row("streams", ", ".join(sorted(STREAMS)))
    table.add_row("cache", str(cache_dir()))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exit codes: 0 done, 2 wrong or missing input, 130 interrupted (``--resume`` continues)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_ScreenHandler()])
    for noisy in ("httpx", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        if code == INTERRUPTED:  # typer catches Ctrl-C and returns the code that it would have ended with
            raise KeyboardInterrupt
    except (ValueError, TypeError, FetchError, OSError, ImportError) as error:
        screen.print(f"[bold red]error:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
    except FloatingPointError as error:
        screen.print(f"[bold red]diverged:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        screen.print(
            "\ninterrupted: finished tasks are kept; the same command with [bold]--resume[/] goes on from there"
        )
        sys.exit(INTERRUPTED)
    except Exception as error:
        show = getattr(error, "show", None)  # typer's own usage errors know how to print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", BAD_INPUT))


class _ScreenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        screen.print(f"[dim]{_escaped(record.getMessage())}[/]", highlight=False, soft_wrap=True)


@contextmanager
def _display(method: str) -> Iterator[Any]:
    """A progress bar on a terminal; nothing elsewhere but the log's line a task."""
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as progress:
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


def _finish(folders: Sequence[Path], records: Sequence[RunRecord], out: Path, *, as_json: bool) -> None:
    from analysis import write_report

    _print_figures(records, as_json=as_json)
    stem = f"{records[0].stream}-seed{records[0].config['seed']}"
    report = write_report(out / f"report-{stem}.html", [str(folder) for folder in folders])
    screen.print(f"report: {report}", highlight=False, soft_wrap=True)


def _print_figures(records: Sequence[RunRecord], *, as_json: bool) -> None:
    if as_json:
        content = [
            {
                "name": r.name,
                "method": r.method,
                "stream": r.stream,
                "status": r.status,
                "tasks": r.tasks,
                "metrics": {k: None if v != v else v for k, v in r.metrics.items()},
            }
            for r in records
        ]
        print(json.dumps(content, indent=1))
        return
    streams = {(r.stream, tuple(r.tasks)) for r in records}
    title = f"{records[0].stream}: accuracy in percent" if len(streams) == 1 else "accuracy in percent"
    table = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    for column in ("run", *(name.upper().replace("_", "-") for name in FIGURES), "minutes", "peak MB", "constraint"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for r in records:
        minutes = sum(sum(v for k, v in t.items() if k not in ("steps", "optimizer")) for t in r.timings) / 60
        worst = max((error for errors in r.constraints for error in errors.values()), default=None)
        table.add_row(
            r.name if r.status == "complete" else f"{r.name} ({r.done} of {len(r.tasks)} tasks)",
            *(_points(r.metrics.get(name)) for name in FIGURES),
            f"{minutes:.1f}",
            f"{r.peak_memory_mb:.0f}",
            "–" if worst is None else f"{worst:.0e}",
        )
    if len(streams) > 1:
        screen.print("[yellow]these runs learned different streams: their figures do not compare[/]")
    Console(width=None if Console().is_terminal else 120).print(table)


CAPTION = (
    "MFT just learned · MFN at the end · MAA average on the way · BWT change of earlier tasks · FWT on tasks not yet "
    "learned · constraint: largest |xᵀx − I|, |Fᵀx|"
)


def _points(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1f}"


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


def _check_device(device: str) -> None:
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available here: {str(error).splitlines()[0]}") from None


def _escaped(text: object) -> str:
    return str(text).replace("[", r"\[")


if __name__ == "__main__":
    main()
