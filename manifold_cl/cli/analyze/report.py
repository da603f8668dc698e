"""``manifold-cl analyze``: the report on spectra and interference of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from manifold_cl.cli.analyze.examples import measured
from manifold_cl.cli.analyze.reading import (
    Alpha,
    Base,
    Common,
    Layers,
    Rank,
    TableFormats,
    TaskNames,
    Transposed,
    file_endings,
    print_notices,
    print_paths,
    reading_options,
    replacing_results,
    require_adapters,
    write_tables,
)
from manifold_cl.cli.analyze.summary import print_summary
from manifold_cl.cli.model_data import Data, Examples, Model, read_model_data
from manifold_cl.cli.options import (
    GATE_CLOSED,
    Device,
    Json,
    Memory,
    MemoryBudget,
    Renames,
    parse_bytes,
    split_names,
    validate_device,
    validate_out,
)
from manifold_cl.cli.screen import Screen, bars, print_table, screen
from manifold_cl.lists import listed

if TYPE_CHECKING:
    import pandas as pd

    from manifold_cl.cli.analysis_package import analysis

    Subjects = Sequence[analysis.report.Subject]

STYLES = {"act": "bold red", "unknown": "bold yellow", "note": "bold cyan", "fine": "bold green"}
SHOWN = (
    ("entropy_energy_normalized", "entropy / ln r", ".3f"),
    ("effective_rank_energy", "effective rank", ".2f"),
    ("stable_rank", "stable rank", ".2f"),
    ("top1_energy", "", ".1%"),
    ("frobenius", "‖ΔW‖", ".3g"),
)
"""Metric, heading and format of the printed table; without a heading it is that of all tables."""
TABLES = ("spectra", "interference", "components", "noise", "left_out", "training", "answers", "drift")
Paths = Annotated[
    list[Path],
    Argument(
        help="Run folders; or adapters of any format, PEFT's too, or hf://owner/name, in the order of their tasks; "
        "or folders that a training watch wrote."
    ),
]
FailIf = Annotated[
    list[str] | None,
    Option(
        metavar="CONDITION",
        help="Exit with 3 if this holds or is unknown, such as 'entropy_min<0.5'; repeat for several.",
    ),
]


def analyze(
    paths: Paths,
    out: Annotated[Path, Option(help="Where the report and the tables go.")] = Path("analysis-report"),
    device: Device = "cpu",
    tasks: TaskNames = None,
    base: Base = None,
    memory: Memory = None,
    common: Common = False,
    rank: Rank = None,
    alpha: Alpha = None,
    layers: Layers = None,
    transposed: Transposed = None,
    rename: Renames = None,
    model: Model = None,
    data: Data = None,
    examples: Examples = 128,
    memory_budget: MemoryBudget = None,
    fail_if: FailIf = None,
    formats: TableFormats = None,
    as_json: Json = False,
) -> None:
    """What adapters do to each other: an HTML report with findings, and tidy tables.

    With --model and --data the report starts with how answers on these examples change. Name the data after a task
    (--data TASK=FILE.jsonl) to compare the model after that task with the model after the last one.

    Exit codes: 0 done, 2 wrong or missing input, 3 a --fail-if condition holds, 130 interrupted.
    """
    from manifold_cl.cli.analysis_package import analysis

    require_adapters(paths, "a run folder, or a folder or file with adapters", base=base, memory=memory)
    gates = [_gate(text, base) for text in fail_if or []]
    validate_out(out)
    validate_device(device)
    endings = file_endings(formats)
    options = reading_options(alpha, rename, base=base, common=common, rank=rank, layers=layers, transposed=transposed)
    budget = parse_bytes(memory_budget) if memory_budget is not None else 2 * 2**30
    given = read_model_data(model, data, examples=examples, device=device)
    with bars(counted=True) as progress:
        bar = progress.add_task("layers", total=None, note="", left="")
        measure = partial(
            analysis.AdapterTables,
            device=device,
            protected=analysis.read_protected(memory) if memory is not None else None,
            base=analysis.Checkpoint.load(base).renamed(options["rename"]) if base is not None else None,
            memory_budget=budget,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
        subjects = _subjects(paths, tasks, measure, options)
        tables = _tables(subjects)
        progress.update(bar, description="batches")
        subjects = measured(subjects, given, lambda done, total: progress.update(bar, completed=done, total=total))
        # before anything is written: a metric that does not exist is wrong input
        judged = _judged(subjects, tables) if gates else []
        closed = {gate: gate.fails(*judged) for gate in gates}
        written = _write(out, subjects, tables | _on_examples(subjects), endings)
    _print_results(out, subjects, tables, closed, judged, written, as_json=as_json)
    if any(closed.values()):
        raise SystemExit(GATE_CLOSED)


def _gate(text: str, base: Path | None) -> analysis.Gate:
    """The gate in the text, after a check of its metric: before the computation that it is about."""
    from manifold_cl.cli.analysis_package import analysis

    gate = analysis.Gate.parse(text)
    if base is None and gate.metric in analysis.tables.gates.RELATIVE:
        raise ValueError(f"--fail-if {text!r} is about a size relative to the base model: give --base as well")
    return gate


def _subjects(
    paths: Sequence[Path], tasks: str | None, measure: Callable[..., analysis.AdapterTables], options: Mapping[str, Any]
) -> Subjects:
    from manifold_cl.cli.analysis_package import analysis

    subjects = analysis.report.read_subjects(paths, tasks=split_names(tasks), measure=measure, **options)
    if not any(subject.tables is not None or subject.training for subject in subjects):
        raise ValueError(f"no adapters in {', '.join(map(str, paths))}: these runs saved none")
    print_notices(_notices(subjects))
    return subjects


def _notices(subjects: Subjects) -> list[str]:
    return list(dict.fromkeys(notice for subject in subjects for notice in subject.notices))


def _tables(subjects: Subjects) -> dict[str, pd.DataFrame]:
    """The tables of all subjects, each with the column ``run``."""
    import pandas as pd

    parts: dict[str, list[pd.DataFrame]] = {"spectra": [], "interference": [], "components": [], "noise": []}
    parts["left_out"] = []
    for subject in subjects:
        if subject.tables is not None:
            numbers = subject.tables.against_chance[["z", "p", "p_holm"]]
            interference = subject.tables.interference.join(numbers)
            others = (subject.tables.components, subject.tables.noise, subject.tables.left_out)
            tables = (subject.tables.spectra, interference, *others)
            for part, table in zip(parts.values(), tables, strict=True):
                part.append(table.assign(run=subject.label))
    parts["training"] = [
        log.assign(training=name, run=subject.label) for subject in subjects for name, log in subject.training.items()
    ]
    return {name: pd.concat(part, ignore_index=True) for name, part in parts.items() if part}


def _judged(subjects: Subjects, tables: Mapping[str, pd.DataFrame]) -> list[pd.DataFrame]:
    """The tables that gates judge: updates that are zero have rows, where those of the page leave them out."""
    import pandas as pd

    found = [
        subject.tables.judged_spectra.assign(run=subject.label) for subject in subjects if subject.tables is not None
    ]
    return list((dict(tables) | ({"spectra": pd.concat(found, ignore_index=True)} if found else {})).values())


def _on_examples(subjects: Subjects) -> dict[str, pd.DataFrame]:
    """The tables of what updates do on examples, each with the column ``run``; none without examples."""
    import pandas as pd

    known = [subject for subject in subjects if subject.answers is not None]
    named = {name: [(one.label, getattr(one, name)) for one in known] for name in ("answers", "drift")}
    parts = {name: [table.assign(run=label) for label, table in tables] for name, tables in named.items()}
    return {name: pd.concat(part, ignore_index=True) for name, part in parts.items() if part}


def _write(
    out: Path, subjects: Subjects, tables: Mapping[str, pd.DataFrame], endings: Sequence[str]
) -> dict[str, Path]:
    """Write tables and report, all or none; the path of each."""
    from manifold_cl.cli.analysis_package import analysis

    with replacing_results(out, TABLES) as folder:
        written = {"report": analysis.report.write_subjects_report(folder / "report.html", subjects)}
        written |= write_tables(folder, tables, endings)
    return {key: out / path.name for key, path in written.items()}


def _print_results(
    out: Path,
    subjects: Subjects,
    tables: Mapping[str, pd.DataFrame],
    closed: Mapping[analysis.Gate, bool],
    judged: Sequence[pd.DataFrame],
    written: Mapping[str, Path],
    *,
    as_json: bool,
) -> None:
    """Print where things were written, a summary, and the gates that closed."""
    from manifold_cl.cli.analysis_package import analysis

    findings = analysis.report.find(subjects)
    zeros = [zero for subject in subjects if subject.tables is not None for zero in subject.tables.zeros]
    values = {gate: gate.value(*judged) for gate in closed}
    if zeros:
        screen.say((f"zero, so without a spectrum: {listed(zeros, 1)}", "yellow"))
    if as_json:
        conditions = [{"gate": str(gate), "value": values[gate], "holds": holds} for gate, holds in closed.items()]
        print_summary(
            out,
            written,
            [finding.to_dict() for finding in findings],
            notices=_notices(subjects),
            left_out=tables["left_out"].to_dict("records") if "left_out" in tables else [],  # type: ignore[arg-type]
            further={"fail_if": conditions, "zero": zeros},
        )
    else:
        if "spectra" in tables:
            _print_summary(tables["spectra"])
            _print_beyond_noise(tables["noise"])
        for finding in findings[: analysis.report.findings.FIRST]:
            words = analysis.report.findings.LEVELS[finding.level]
            Screen().say((f"{words}: ", STYLES[finding.level]), finding.headline)
        print_paths(written)
    for gate in [gate for gate, holds in closed.items() if holds]:
        reason = f"it is {values[gate]:.4g}"
        if isnan(values[gate]):
            unknown = gate.unknown(*judged)
            reason = f"{len(unknown)} values are unknown, the first is that of {unknown[0]}"
        screen.say(("gate closed:", "bold red"), f" {gate}, {reason}")


def _print_summary(spectra: pd.DataFrame) -> None:
    """Print means over layers of what each task added, one row per task."""
    from manifold_cl.cli.analysis_package import analysis

    rows = spectra[spectra["update"] == "task"]
    means = rows.groupby(["run", "task", "metric"], sort=False)["value"].mean().unstack()
    means = means.reindex(columns=[metric for metric, _, _ in SHOWN])
    names = ["run", "task"] if rows["run"].nunique() > 1 else ["task"]
    cells = []
    for index, values in means.iterrows():
        numbers = ("–" if isnan(values[metric]) else format(values[metric], form) for metric, _, form in SHOWN)
        cells.append((*map(str, index[-len(names) :]), *numbers))  # type: ignore[index]  # (run, task)
    titles = analysis.tables.titles.TITLES
    headings = (*names, *(heading or titles[metric] for metric, heading, _ in SHOWN))
    print_table("what each task added, mean over layers", headings, cells, leading=len(names))


def _print_beyond_noise(noise: pd.DataFrame) -> None:
    """Print in how many layers of each task a direction is stronger than random factors explain."""
    known = noise[noise["p"].notna()]
    parts = [
        f"{task} in {int((rows['beyond'] > 0).sum())} of {len(rows)} layers"
        for task, rows in known.groupby("task", sort=False)
    ]
    if parts:
        shown = listed(parts, 4, separator="; ", kind="tasks")
        Screen().say(f"leading direction beyond noise: {shown}")
