"""``manifold-cl study``: methods × seeds × task orders, resumable, with tables and a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from manifold_cl.cli.cells import show_cells
from manifold_cl.cli.options import Address, Engine, Json, require_path, validate_device, validate_out
from manifold_cl.cli.screen import INTERRUPTED, Screen, print_table, screen
from manifold_cl.cli.study_table import print_study

if TYPE_CHECKING:
    from manifold_cl.continual import RunRecord
    from manifold_cl.study import Cell, CellFailure, Estimate, Study, StudyPlan
    from manifold_cl.study import Engine as RunsCells

INCOMPLETE = 1
"""Exit code if a cell failed; all others were run."""


def study(
    config: Annotated[Path, Argument(help="The study's TOML file.")],
    out: Annotated[Path | None, Option(help="Folder of the results (default: studies/NAME).")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show cells to run and estimated time; run nothing.")] = False,
    extend: Annotated[
        bool, Option("--extend", help="Add the file's further methods, seeds and orders to the folder.")
    ] = False,
    engine: Engine = "local",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Run every method of a study with every seed and order; the same command resumes an interrupted study.

    Downloads the archives of a text stream on first use, with --dry-run too. Runs code that the file names as its
    stream. With --engine ray the cells run on all nodes of a Ray cluster.
    """
    from manifold_cl.cli.analysis_package import analysis
    from manifold_cl.study import LocalEngine, Study, make_engine, read_plan, validate_on_model

    analysis.tables.need_parquet()  # now, not after hours of runs
    if config.is_dir():
        raise IsADirectoryError(f"{config} is a folder: give the study's TOML file")
    require_path(config, "the study's TOML file")
    chosen = make_engine(engine, address=address)
    plan = read_plan(config)
    if isinstance(chosen, LocalEngine):
        try:
            validate_device(plan.device)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from None
    study_runs = Study(plan, out or Path("studies") / plan.name)
    validate_out(study_runs.folder, write=not dry_run)
    study_runs.validate(extend=extend)
    if pending := study_runs.pending():
        validate_on_model(plan, config)
    if not pending:
        chosen = LocalEngine()  # no connection for nothing
    with chosen:
        if dry_run:
            _print_plan(study_runs, pending, chosen, as_json=as_json)
            return
        failures = _run(study_runs, chosen, extend=extend)
    try:
        if len(study_runs.pending()) < len(plan.cells):
            finish(study_runs.folder, as_json=as_json)
    finally:
        for failure in failures:
            screen.say(("failed:", "bold red"), f" {failure.cell.name}: {failure.reason}")
        if failures:
            screen.say("the same command tries these again, from their last finished task")
    if failures:
        raise typer.Exit(INCOMPLETE)


def _run(study_runs: Study, engine: RunsCells, *, extend: bool) -> list[CellFailure]:
    """Run the cells of a study that are not complete."""
    pending = study_runs.pending()
    if done := len(study_runs.plan.cells) - len(pending):
        screen.say(f"{done} of {len(study_runs.plan.cells)} cells are complete in {study_runs.folder}")
    try:
        if pending:
            prepare(engine, study_runs.plan)
        with show_cells(study_runs.plan, done) as show:
            return study_runs.run(extend=extend, engine=engine, on_event=show)
    except KeyboardInterrupt:
        screen.say("\ninterrupted: finished tasks are kept; the same command resumes from there")
        raise SystemExit(INTERRUPTED) from None


def prepare(engine: RunsCells, plan: StudyPlan) -> None:
    """Validate a plan on an engine, and print how many cells run at a time on a cluster."""
    if engine.name == "local":
        return
    with screen.status("validating the nodes"):
        engine.validate(plan)
        slots = engine.slots(plan)
    screen.say((f"{engine.name}: {slots} cells at a time", "dim"))


def finish(folder: Path, *, as_json: bool) -> None:
    """Write tables and report of a study's folder, and print its summary."""
    from manifold_cl.cli.analysis_package import analysis

    results = analysis.StudyResults.load(folder)
    print_study(results, as_json=as_json)
    for path in (
        analysis.write_table(results.figures(), folder / "figures.parquet"),
        analysis.write_table(results.accuracy(), folder / "accuracy.parquet"),
        analysis.write_study_report(folder / "report.html", results),
    ):
        (screen if as_json else Screen()).say(f"written: {path}")


def _print_plan(study_runs: Study, pending: Sequence[Cell], engine: RunsCells, *, as_json: bool) -> None:
    plan, records = study_runs.plan, study_runs.records()
    estimates, left, slots = measure(plan, pending, records, engine)
    rows: list[dict[str, Any]] = [
        {
            "method": entry.label,
            "cells": sum(cell.label == entry.label for cell in plan.cells),
            "to_run": sum(cell.label == entry.label for cell in pending),
            "seconds_per_cell": estimates[entry.label].seconds if entry.label in estimates else None,
            "estimate_from": estimates[entry.label].source if entry.label in estimates else "all done",
        }
        for entry in plan.entries
    ]
    if as_json:
        print(json.dumps({"methods": rows, "seconds": left, "processes": slots, "engine": engine.name}, indent=1))
        return
    title = f"{plan.name}: {len(plan.cells)} cells on {plan.stream}, {len(pending)} to run"
    print_estimates(title, ("method", "cell"), rows, left, slots)


def print_estimates(
    title: str, names: tuple[str, str], rows: Sequence[Mapping[str, Any]], left: float, slots: int
) -> None:
    """Print a table of estimates, and the seconds ``left`` in all with ``slots`` runs at a time.

    Args:
        title: above the table.
        names: of what a row is about, and of what it counts, in the singular.
        rows: name, number, number to run, seconds of one or None, and source of the estimate.
        left: seconds until all are done.
        slots: how many run at a time.
    """
    lines = [
        (name, str(count), str(to_run), "–" if seconds is None else f"{seconds / 60:.1f}", source)
        for name, count, to_run, seconds, source in (row.values() for row in rows)
    ]
    time = f"about {timedelta(seconds=round(left))} (h:min:s) with {slots} {names[1]}{'s' * (slots > 1)} at a time"
    print_table(title, (names[0], f"{names[1]}s", "to run", f"minutes per {names[1]}", "estimate from"), lines, time)


def measure(
    plan: StudyPlan, pending: Sequence[Cell], records: Mapping[Cell, RunRecord], engine: RunsCells
) -> tuple[dict[str, Estimate], float, int]:
    """The estimates by label, the seconds until all pending cells are done, and the cells at a time."""
    from manifold_cl.study import estimate, time_left

    if not pending:
        return {}, 0.0, engine.slots(plan)
    prepare(engine, plan)
    with screen.status("measuring") as status:
        measured = estimate(
            plan,
            records,
            measure=engine.measure,
            on_label=lambda label: status.update(screen.styled(f"measuring {label}")),
        )
    slots = engine.slots(plan)
    return {each.label: each for each in measured}, time_left(pending, records, measured, slots), slots
