"""``manifold-cl search``: trials of options on equal terms, resumable, with the winner of each list."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from manifold_cl.cli.cells import show_cells
from manifold_cl.cli.options import Address, Device, Engine, Json, at_least, require_path, validate_device, validate_out
from manifold_cl.cli.screen import INTERRUPTED, Screen, print_table, screen
from manifold_cl.cli.study import INCOMPLETE, prepare, print_estimates
from manifold_cl.lists import listed

if TYPE_CHECKING:
    from rich.status import Status

    from manifold_cl.study import CellFailure, Event, Search, SearchGroup
    from manifold_cl.study import Engine as RunsCells

MEASURES = (
    "participation_ratio",
    "effective_rank_energy",
    "effective_rank_roy_vetterli",
    "stable_rank",
    "spectral_norm",
    "frobenius",
)
"""Of the update of one layer and task (docs/analysis.md, "Spectra"); results have their means."""
WITHOUT_MEASURES = ("gpm", "joint")
"""Methods whose updates have no low rank, or are of all tasks at once."""


def search(
    lists: Annotated[list[Path], Argument(metavar="LIST.json...", help="Lists of trials, one per method.")],
    out: Annotated[Path, Option(help="Folder of the results, tuning-LIST.json.")] = Path("searches"),
    dry_run: Annotated[bool, Option("--dry-run", help="Show trials to run and estimated time; run nothing.")] = False,
    engine: Engine = "local",
    address: Address = None,
    processes: Annotated[
        int | None, Option(callback=at_least(1), help="Trials at a time (default: cores / threads).")
    ] = None,
    threads: Annotated[int, Option(callback=at_least(1), help="Threads per trial.")] = 1,
    cpus: Annotated[
        float | None, Option(help="Cores per trial, with --engine ray (default: as many as threads).")
    ] = None,
    gpus: Annotated[float | None, Option(help="GPUs per trial, with --engine ray; 0.5 puts two on one GPU.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Run the trials in each list, and name the one with the highest final accuracy (MFN); the same command resumes.

    Lists of one stream and seed share the processes. A study takes a winner by winner_of. Downloads and code as in
    manifold-cl study.
    """
    from manifold_cl.study import LocalEngine, Resources, make_engine, read_searches

    chosen = make_engine(engine, address=address)
    local = isinstance(chosen, LocalEngine)
    _validate_resources(local, processes, cpus=cpus, gpus=gpus)
    for path in lists:
        _require_list(path)
    if local:
        validate_device(device)
    validate_out(out, write=False)
    groups = read_searches(lists, out, Resources(device, threads, processes, cpus, gpus))
    for group in groups:
        if group.pending():
            group.validate_model()
    if any(group.pending() for group in groups):
        validate_out(out, write=not dry_run)
    else:
        chosen = LocalEngine()  # no connection for nothing
    with chosen:
        if dry_run:
            _print_plan(groups, chosen, as_json=as_json)
            return
        failures = _run(groups, chosen)
    _print_results([each for group in groups for each in group.searches], as_json=as_json)
    for failure in failures:
        screen.say(("failed:", "bold red"), f" {failure.cell.name}: {failure.reason}")
    if failures:
        screen.say("the same command tries these again, from their last finished task")
        raise typer.Exit(INCOMPLETE)


def update_measures(folder: Path, method: str) -> dict[str, float]:
    """Means of `MEASURES` over the layers and tasks of a run; none where no update has a spectrum, all being zero."""
    from manifold_cl.cli.analysis_package import analysis

    if method in WITHOUT_MEASURES:
        return {}
    table = analysis.spectrum_table(analysis.AdapterSet.load(folder), zeros="omit")
    means = table[table["update"] == "task"].groupby("metric")["value"].mean()
    return {measure: round(float(means[measure]), 4) for measure in MEASURES if measure in means}


def _require_list(path: Path) -> None:
    require_path(path, "the list of trials, a JSON file")
    if path.is_dir():
        lists = [str(each) for each in sorted(path.glob("*.json"))]
        inside = f"such as {listed(lists)}" if lists else "and this folder holds none"
        raise IsADirectoryError(f"{path} is a folder: give lists of trials, JSON files, {inside}")


def _validate_resources(local: bool, processes: int | None, **shares: float | None) -> None:
    from manifold_cl.study.validation import validate_share

    for name, share in shares.items():
        if share is not None:
            if local:
                raise ValueError(f"--{name} {share:g} is for --engine ray: local trials share what this machine has")
            validate_share(f"--{name}", share)
    if processes is not None and not local:
        raise ValueError(f"--processes {processes} is for --engine local: give Ray --cpus and --gpus per trial")


def _run(groups: Sequence[SearchGroup], engine: RunsCells) -> list[CellFailure]:
    failures = []
    try:
        for group in groups:
            pending = group.pending()
            if done := len(group.plan.cells) - len(pending):
                screen.say(f"{done} of {len(group.plan.cells)} trials have results in {group.searches[0].out}")
            if pending:
                prepare(engine, group.plan)
            with show_cells(group.plan, done) as show:
                failures += group.run(engine, _with_score(group, show), update_measures)
    except KeyboardInterrupt:
        screen.say("\ninterrupted: finished tasks are kept; the same command resumes from there")
        raise SystemExit(INTERRUPTED) from None
    return failures


def _with_score(group: SearchGroup, show: Callable[[Event], None]) -> Callable[[Event], None]:
    """Shows events, those of finished trials with options and score."""

    def show_scored(event: Event) -> None:
        if event.kind == "done":
            search, index = group.trials[event.cell]
            result = next(each for each in search.results() if each["options"] == search.trials[index])
            event = replace(event, message=f"{_in_words(result['options'])}: MFN {result['mfn']:.2f}")
        show(event)

    return show_scored


def _show_label(status: Status, label: str) -> None:
    status.update(screen.styled(f"measuring {label}"))


def _in_words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"


def _print_results(searches: Sequence[Search], *, as_json: bool) -> None:
    """Print the trials of every search, best first, and its file."""
    from manifold_cl.study.trials import FIGURES

    found = [(search, search.results()) for search in searches]
    if as_json:
        tables: list[dict[str, Any]] = [
            {"search": each.name, "file": str(each.path), "trials": sorted(results, key=lambda r: -r["mfn"])}
            for each, results in found
        ]
        print(json.dumps(tables, indent=1))
    for each, results in found if not as_json else ():
        if results:
            rows = [
                (
                    _in_words(trial["options"]),
                    *("–" if trial[figure] is None else f"{trial[figure]:.2f}" for figure in FIGURES),
                )
                for trial in sorted(results, key=lambda trial: -trial["mfn"])
            ]
            title = f"{each.name}: {each.method} on {each.stream}, seed {each.seed}"
            print_table(title, ("options", *map(str.upper, FIGURES)), rows, "the first row won: highest MFN")
    for each, results in found:
        if results:
            (screen if as_json else Screen()).say(f"written: {each.path}")


def _print_plan(groups: Sequence[SearchGroup], engine: RunsCells, *, as_json: bool) -> None:
    from manifold_cl.study import time_left

    rows: list[dict[str, Any]] = []
    left, slots = 0.0, 0
    for group in groups:
        pending = group.pending()
        estimates = {}
        if pending:
            prepare(engine, group.plan)
            with screen.status("measuring") as status:
                measured = group.estimate(engine, partial(_show_label, status))
            estimates = {each.label: each for each in measured}
            left += time_left(pending, group.records(), measured, engine.slots(group.plan))
        slots = max(slots, engine.slots(group.plan))
        for each in group.searches:
            mine = [estimates[cell.label] for cell in pending if group.trials[cell][0] is each]
            rows.append(
                {
                    "search": each.name,
                    "trials": len(each.trials),
                    "to_run": len(mine),
                    "seconds_per_trial": mine[0].seconds if mine else None,
                    "estimate_from": mine[0].source if mine else "all done",
                }
            )
    if as_json:
        print(json.dumps({"searches": rows, "seconds": left, "processes": slots, "engine": engine.name}, indent=1))
        return
    title = f"{sum(row['trials'] for row in rows)} trials, {sum(row['to_run'] for row in rows)} to run"
    print_estimates(title, ("search", "trial"), rows, left, slots)
