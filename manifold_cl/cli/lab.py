"""``manifold-cl lab``: retractions verified, then retractions and steps at work on problems with known optimum."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Option

from manifold_cl.cli.options import Json, at_least, validate_out
from manifold_cl.cli.retractions import print_short
from manifold_cl.cli.screen import Screen, bars, print_table, screen
from manifold_cl.lab import PROBLEMS
from manifold_cl.plugins import unknown
from manifold_cl.rules import validate_share

if TYPE_CHECKING:
    from manifold_cl.lab.suite import SuiteReport

HEADINGS = ("contestant", "solved", "area, gradients", "area, seconds", "|xᵀx − I|", "|Fᵀx|", "")
STREAM_PROBLEM = "manifold_cl.lab.text:TextTask"
FIGURES = ("profiles.svg", "curves.svg")

Plugins = Annotated[
    list[str] | None,
    Option(
        metavar="MODULE:NAME",
        help="Retraction, step or problem of your own, as module:name or file.py:name; repeatable.",
    ),
]
Problems = Annotated[list[str] | None, Option(metavar="NAME", help="Problem to use; repeatable (default: all).")]
Only = Annotated[
    list[str] | None,
    Option(metavar="NAME", help="Contestant, such as adamw or 'momentum + qr'; repeatable (default: all)."),
]
Every = Annotated[bool, Option("--all", help="Combine every step with every retraction, which takes much longer.")]
WithStream = Annotated[
    bool, Option("--with-stream", help="Add a task of text-three, which needs its encoder and texts.")
]


def lab(
    plugin: Plugins = None,
    problem: Problems = None,
    only: Only = None,
    every: Every = False,
    with_stream: WithStream = False,
    gap: Annotated[float, Option(help="Relative gap to the optimum that counts as solved.")] = 1e-4,
    evaluations: Annotated[int, Option(callback=at_least(4), help="Gradients and Hessian products per run.")] = 400,
    starts: Annotated[int, Option(callback=at_least(1), help="Measured starts per problem.")] = 2,
    jobs: Annotated[int, Option(callback=at_least(1), help="Processes, each with one thread.")] = 2,
    out: Annotated[Path | None, Option(help="Folder for lab.json and the figures.")] = None,
    as_json: Json = False,
) -> None:
    """Compare retractions and steps on problems whose optimum is known.

    First every retraction is verified. Then every contestant gets the same search for a rate on every problem, and is
    measured from other starts. The performance profiles state how often it is within a factor of the best.
    """
    _validate(problem, gap, out)
    from manifold_cl.continual.environment import library_versions, machine
    from manifold_cl.geometry.lab import measure_retractions
    from manifold_cl.lab.contestants import entrants, working_retractions
    from manifold_cl.lab.runs import Budget
    from manifold_cl.lab.suite import run_suite

    own = [*(plugin or ()), *([STREAM_PROBLEM] if with_stream else [])]
    # Wrong names and plug-ins are refused before the work.
    field = entrants(plugins=own, problems=problem or (), only=only or (), everything=every)
    budget = Budget(evaluations=evaluations, starts=starts, gap=gap, final_gap=min(1e-8, gap))
    with bars() as progress:
        bar = progress.add_task("retractions", total=None, note="", left="")

        def show(label: str, done: int, total: int) -> None:
            progress.update(bar, description=label, completed=done, total=total)

        sound, broken = working_retractions(field)
        rules = measure_retractions(
            sound or ["polar"], shape=(1024, 16), complement=64, batch=8, steps=100, laps=3, on_progress=show
        )
        if not as_json:
            print_short(rules)
        report = run_suite(
            own, problems=problem or (), budget=budget, only=only or (), everything=every, jobs=jobs, on_progress=show
        )
    content = {
        **report.to_dict(),
        "retractions": rules.to_dict()["rows"],
        "versions": library_versions(),
        "machine": machine(),
        "jobs": jobs,
    }
    if as_json:
        print(json.dumps(content, allow_nan=False))
    else:
        _print(report)
    for name, reason in {**broken, **report.missing, **report.excluded}.items():
        screen.say((name, "bold red"), f" {reason}")
    for row in rules.rows:
        for failure in row.failures:
            screen.say((row.name, "bold red"), f" violates a law: {failure}")
    if out is not None:
        _write(out, report, content)
        (screen if as_json else Screen()).say(f"written: {out / 'lab.json'}, {', '.join(FIGURES)}")


def _validate(problem: list[str] | None, gap: float, out: Path | None) -> None:
    if wrong := [name for name in problem or () if name not in list(PROBLEMS)]:
        raise ValueError(unknown("problem", wrong[0], sorted(PROBLEMS)))
    validate_share("--gap, relative to the gap at the start,", gap, one=False)
    if out is not None:
        validate_out(out)


def _write(out: Path, report: SuiteReport, content: dict[str, Any]) -> None:
    from manifold_cl.cli.analysis_package import analysis
    from manifold_cl.files import write_json
    from manifold_cl.lab.figures import plot_curves, plot_profiles  # need matplotlib

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "lab.json", content)
    analysis.save_figure(plot_profiles(report), out / FIGURES[0])
    analysis.save_figure(plot_curves(report), out / FIGURES[1])


def _print(report: SuiteReport) -> None:
    budget = report.budget
    instances = len(report.problems) * budget.starts
    title = (
        f"{len(report.problems)} problem(s), {budget.starts} start(s): {instances} instance(s); solved: a relative "
        f"gap of {budget.gap:g} within {budget.evaluations} gradients; {budget.trials} trials per search"
    )
    summaries = {entry["name"]: entry for entry in report.to_dict()["contestants"]}
    order = report.ranking("seconds")
    rows = [_row(report, name, summaries[name], instances) for name in [*order, *report.excluded]]
    key = (
        "solved: instances · area: mean share of the performance profile over log τ, τ from 1 to 100; 1 is the best "
        "· last columns: largest errors of the measured runs, in float64"
    )
    print_table(title, HEADINGS, rows, key)
    medians = {(r["contestant"], r["problem"]): r["median"] for r in report.to_dict()["results"]}
    problems = [problem.name for problem in report.problems]
    cells = [
        (name, *(_median(medians[name, problem]["evaluations"]) for problem in problems))
        for name in [*order, *report.excluded]
    ]
    seconds = f"took {report.wall_seconds:.0f} s, {report.cpu_seconds:.0f} s of CPU time"
    print_table("Gradients and Hessian products to the gap, median of the starts", ("contestant", *problems), cells)
    Screen().say((seconds, "dim"))


def _row(report: SuiteReport, name: str, summary: dict[str, Any], instances: int) -> tuple[str | Text, ...]:
    results = report.of(name)
    errors = [max((getattr(r, kind) for r in results), default=math.nan) for kind in ("orthonormality", "leak")]
    shown = [f"{error:.0e}" for error in errors]
    if name in report.excluded:
        return (name, "–", "–", "–", *shown, Text("excluded", "red"))
    solved = round(summary["evaluations"]["solved_share"] * instances)
    areas = [f"{summary[unit]['area']:.2f}" for unit in ("evaluations", "seconds")]
    return (name, f"{solved}/{instances}", *areas, *shown, Text("plug-in", "green") if summary["plugin"] else "")


def _median(count: float | None) -> str:
    return "–" if count is None else f"{count:.0f}"
