"""``manifold-cl study``: methods × seeds × task orders, resumable, with tables and a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from manifold_cl.cli.screen import INTERRUPTED, Words, bars, check_device, check_out, output, screen
from manifold_cl.cli.study_table import print_study
from manifold_cl.study import CellFailure, Event, Study, check_on_model, estimate, read_plan

INCOMPLETE = 1
"""Exit code when a cell failed; all others were run."""


def study(
    config: Annotated[Path, typer.Argument(help="The study's TOML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results (default: studies/NAME).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and how long; run nothing.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add the file's further methods, seeds and orders to the folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary, or the plan, as JSON.")] = False,
) -> None:
    """Run every method of a study with every seed and order; the same command goes on after any interruption.

    The archives of a text stream are downloaded on first use, by --dry-run too, and code that the file names as its
    stream runs.
    """
    from manifold_cl.cli.analysis_package import need_parquet

    need_parquet()  # now, not after hours of runs

    plan = read_plan(config)
    check_device(plan.device)
    whole = Study(plan, out or Path("studies") / plan.name)
    check_out(whole.folder)
    whole.check(extend=extend)
    pending = whole.pending()
    if pending:
        check_on_model(plan)
    if dry_run:
        _print_plan(whole, as_json=as_json)
        return
    done = len(plan.cells) - len(pending)
    if done:
        screen.say(f"{done} of {len(plan.cells)} cells are complete in {whole.folder}")
    try:
        with display(whole, done) as show:
            failures = whole.run(extend=extend, on_event=show)
    except KeyboardInterrupt:
        screen.say("\ninterrupted: finished tasks are kept; the same command goes on from there")
        raise SystemExit(INTERRUPTED) from None
    try:
        if any(record.status == "complete" for record in whole.records().values()):
            finish(whole.folder, as_json=as_json)
    finally:
        _print_failures(failures)
    if failures:
        raise typer.Exit(INCOMPLETE)


def finish(folder: Path, *, as_json: bool) -> None:
    """Write tables and report of a study's folder, and print its summary."""
    from manifold_cl.cli.analysis_package import StudyResults, write_study_report, write_table

    results = StudyResults.load(folder)
    print_study(results, as_json=as_json)
    written = [
        write_table(results.figures(), folder / "figures.parquet"),
        write_table(results.accuracy(), folder / "accuracy.parquet"),
        write_study_report(folder / "report.html", results),
    ]
    for path in written:
        screen.say(f"written: {path}")


@contextmanager
def display(whole: Study, done: int) -> Iterator[Callable[[Event], None]]:
    """One bar for the study and a line for each cell at work; elsewhere than on a terminal a line a finished cell."""
    columns = (
        Words("{task.description}", "bold"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Words("{task.fields[note]}"),
    )
    with bars(*columns) as progress:
        total = progress.add_task(whole.plan.name, total=len(whole.plan.cells), completed=done, note="")
        lines = {}

        def show(event: Event) -> None:
            name = event.cell.name
            if event.kind == "started":
                lines[name] = progress.add_task(name, total=None, note="starting")
            elif event.kind == "progress":
                where = f"{event.phase} {event.said}" + (f" {event.step}/{event.steps}" if event.steps else "")
                share = event.step / event.steps if event.steps and event.phase == "train" else 0
                note = where if event.phase != "zero-shot" else "zero-shot"
                progress.update(lines[name], total=event.tasks, completed=event.task + share, note=note)
            elif event.kind == "note":
                screen.say((f"{name}: {event.said}", "yellow"))
            else:
                progress.remove_task(lines.pop(name))
                progress.advance(total)
                colour = "dim" if event.kind == "done" else "red"
                said = f": {event.said}" if event.said else ""
                screen.say((f"{event.kind}: {name}{said}", colour))

        yield show


def _print_plan(whole: Study, *, as_json: bool) -> None:
    plan, records = whole.plan, whole.records()
    with screen.status("measuring") as status:
        found = estimate(plan, records, on_label=lambda label: status.update(screen.styled(f"measuring {label}")))
    pending = whole.pending()
    known = {each.label: each for each in found}
    rows = [
        {
            "method": entry.label,
            "cells": sum(cell.label == entry.label for cell in plan.cells),
            "to_run": sum(cell.label == entry.label for cell in pending),
            "seconds_a_cell": known[entry.label].seconds if entry.label in known else None,
            "estimate_from": known[entry.label].source if entry.label in known else "all done",
        }
        for entry in plan.entries
    ]
    left = sum(known[cell.label].seconds for cell in pending) / min(plan.processes, max(1, len(pending)))
    if as_json:
        print(json.dumps({"methods": rows, "seconds": left, "processes": plan.processes}, indent=1))
        return
    table = Table(
        title=f"{plan.name}: {len(plan.cells)} cells on {plan.stream}, {len(pending)} to run",
        title_justify="left",
        caption=f"about {timedelta(seconds=round(left))} (h:min:s) with {plan.processes} processes at a time",
        caption_justify="left",
    )
    for column in ("method", "cells", "to run", "minutes a cell", "estimate from"):
        table.add_column(column, justify="left" if column in ("method", "estimate from") else "right")
    for row in rows:
        label = str(row["method"])
        minutes = f"{known[label].seconds / 60:.1f}" if label in known else "–"
        table.add_row(label, str(row["cells"]), str(row["to_run"]), minutes, str(row["estimate_from"]))
    output(120).print(table)


def _print_failures(failures: Sequence[CellFailure]) -> None:
    for failure in failures:
        reason = f"{failure.cell.name}: {failure.reason}"
        screen.say(("failed:", "bold red"), f" {reason}")
    if failures:
        screen.say("the same command tries these again, from their last finished task")
