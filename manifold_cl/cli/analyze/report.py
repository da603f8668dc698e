"""``manifold-cl analyze``: the report on spectra and interference of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from manifold_cl.cli.analyze.examples import measured
from manifold_cl.cli.model_data import Data, Examples, Model, read_model_data
from manifold_cl.cli.options import (
    Device,
    Json,
    Memory,
    MemoryBudget,
    Renames,
    parse_bytes,
    parse_renames,
    require_path,
    validate_device,
    validate_out,
)
from manifold_cl.cli.screen import Screen, bars, print_table, screen

if TYPE_CHECKING:
    import pandas as pd

    from manifold_cl.cli.analysis_package import analysis

    Subjects = Sequence[analysis.report.Subject]

GATE_CLOSED = 3
"""Exit code when a ``--fail-if`` condition is met; everything has been written by then."""
STYLES = {"act": "bold red", "unknown": "bold yellow", "note": "bold cyan", "fine": "bold green"}
SHOWN = (
    ("entropy_energy_normalized", "entropy / ln r", ".3f"),
    ("effective_rank_energy", "effective rank", ".2f"),
    ("stable_rank", "stable rank", ".2f"),
    ("top1_energy", "energy in σ₁", ".1%"),
    ("frobenius", "‖ΔW‖", ".3g"),
)


class TableFormat(StrEnum):
    """A file format of tables; Parquet needs pyarrow."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


Paths = Annotated[
    list[Path],
    Argument(
        help="Run folders; or adapters of any format, PEFT's too, or hf://owner/name, in the order of their tasks."
    ),
]
TaskNames = Annotated[
    str | None, Option(help="Names of the tasks with commas, in the order of the paths; run folders keep their own.")
]
Base = Annotated[
    Path | None,
    Option(help="Checkpoint of the base model: for DoRA, OSF, dense checkpoints, and ratios to the weights."),
]

Alpha = Annotated[str | None, Option(help="Alpha where a LoRA file has none: a number, or rank for scaling 1.")]
Layers = Annotated[str | None, Option(help="Regular expression: only layers that it finds are read.")]
Transposed = Annotated[
    str | None, Option(help="Regular expression: layers whose base weight is stored inputs by outputs (Conv1D).")
]
FailIf = Annotated[
    list[str] | None,
    Option(
        metavar="CONDITION",
        help="Exit with 3 if this holds or is unknown, such as 'entropy_min<0.5'; repeat for several.",
    ),
]
Formats = Annotated[
    list[TableFormat] | None,
    Option("--format", metavar="FORMAT", help="csv (default), json or parquet; repeatable."),
]


def analyze(
    paths: Paths,
    out: Annotated[Path, Option(help="Where the report and the tables go.")] = Path("analysis-report"),
    device: Device = "cpu",
    tasks: TaskNames = None,
    base: Base = None,
    memory: Memory = None,
    common: Annotated[bool, Option("--common", help="Analyse only the layers that all tasks have in common.")] = False,
    rank: Annotated[int | None, Option(help="Rank to which dense differences are truncated.")] = None,
    alpha: Alpha = None,
    layers: Layers = None,
    transposed: Transposed = None,
    rename: Renames = None,
    model: Model = None,
    data: Data = None,
    examples: Examples = 128,
    memory_budget: MemoryBudget = None,
    fail_if: FailIf = None,
    formats: Formats = None,
    as_json: Json = False,
) -> None:
    """What adapters do to each other: an HTML report with findings, and tidy tables.

    With --model and --data the report starts with how answers on these examples change. Name the data after a task
    (--data TASK=FILE.jsonl) to compare the model after that task with the model after the last one.

    Exit codes: 0 done, 2 wrong or missing input, 3 a --fail-if condition holds, 130 interrupted.
    """
    from manifold_cl.cli.analysis_package import analysis

    _require_paths(paths, memory, base)
    gates = [_gate(text, base) for text in fail_if or []]
    validate_out(out)
    validate_device(device)
    endings = _endings(formats)
    renames = parse_renames(rename)
    budget = parse_bytes(memory_budget) if memory_budget is not None else 2 * 2**30
    given = read_model_data(model, data, examples=examples, device=device)
    with bars(counted=True) as progress:
        bar = progress.add_task("layers", total=None, note="", left="")
        measure = partial(
            analysis.AdapterTables,
            device=device,
            protected=analysis.read_protected(memory) if memory is not None else None,
            base=analysis.Checkpoint.load(base).renamed(renames) if base is not None else None,
            memory_budget=budget,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
        options = {"base": base, "common": common, "rank": rank, "alpha": parse_alpha(alpha), "layers": layers}
        subjects = _subjects(paths, tasks, measure, {**options, "transposed": transposed, "rename": renames})
        tables = _tables(subjects)
        progress.update(bar, description="batches")
        subjects = measured(subjects, given, lambda done, total: progress.update(bar, completed=done, total=total))
        # before anything is written: a metric that does not exist is wrong input
        closed = {gate: gate.fails(*tables.values()) for gate in gates}
        written = _write(out, subjects, tables | _on_examples(subjects), endings)
    _print_results(subjects, tables, closed, written, as_json=as_json)
    if any(closed.values()):
        raise SystemExit(GATE_CLOSED)


def _endings(formats: Sequence[TableFormat] | None) -> list[str]:
    """Endings of the tables' files; ImportError for Parquet without pyarrow."""
    from manifold_cl.cli.analysis_package import analysis

    if TableFormat.PARQUET in (formats or []):
        analysis.tables.need_parquet()
    return [f".{one.value}" for one in dict.fromkeys(formats or [TableFormat.CSV])]


def _require_paths(paths: Sequence[Path], memory: Path | None, base: Path | None) -> None:
    """Refuse paths that do not exist."""
    for path in paths:
        require_path(path, "a run folder, or a folder or file with adapters")
    for given, needed in ((memory, "for --memory a folder with memory.safetensors"), (base, "for --base a checkpoint")):
        if given is not None:
            require_path(given, needed)


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

    names = [name.strip() for name in tasks.split(",")] if tasks is not None else None
    subjects = analysis.report.read_subjects(paths, tasks=names, measure=measure, **options)
    if not any(subject.tables is not None for subject in subjects):
        raise ValueError(f"no adapters in {', '.join(map(str, paths))}: these runs saved none")
    for notice in _notices(subjects):
        screen.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return subjects


def _notices(subjects: Subjects) -> list[str]:
    given = (notice for subject in subjects if subject.adapters is not None for notice in subject.adapters.notices)
    return list(dict.fromkeys(given))


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
    return {name: pd.concat(part, ignore_index=True) for name, part in parts.items()}


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
    """Write tables and report; the path of each."""
    from manifold_cl.cli.analysis_package import analysis

    out.mkdir(parents=True, exist_ok=True)
    written = {
        f"{name}{'' if len(endings) == 1 else ending}": analysis.write_table(table, out / f"{name}{ending}")
        for name, table in tables.items()
        for ending in endings
    }
    return {"report": analysis.report.write_subjects_report(out / "report.html", subjects), **written}


def _print_results(
    subjects: Subjects,
    tables: Mapping[str, pd.DataFrame],
    closed: Mapping[analysis.Gate, bool],
    written: Mapping[str, Path],
    *,
    as_json: bool,
) -> None:
    """Print where things were written, a summary, and the gates that closed."""
    from manifold_cl.cli.analysis_package import analysis

    findings = analysis.report.find(subjects)
    zeros = [zero for subject in subjects if subject.tables is not None for zero in subject.tables.zeros]
    values = {gate: gate.value(*tables.values()) for gate in closed}
    if zeros:
        more = f" and {len(zeros) - 1} more" if len(zeros) > 1 else ""
        screen.say((f"zero, so without a spectrum: {zeros[0]}{more}", "yellow"))
    if as_json:
        conditions = [
            {"gate": str(gate), "value": None if isnan(values[gate]) else values[gate], "holds": holds}
            for gate, holds in closed.items()
        ]
        paths = {name: str(path) for name, path in written.items()}
        result = {"fail_if": conditions, "zero": zeros, "notices": _notices(subjects)}
        result["findings"] = [finding.to_dict() for finding in findings]
        result["left_out_entries"] = tables["left_out"].to_dict("records")
        print(json.dumps(paths | result))
    else:
        _print_summary(tables["spectra"])
        _print_beyond_noise(tables["noise"])
        for finding in findings[: analysis.report.findings.FIRST]:
            words = analysis.report.findings.LEVELS[finding.level]
            Screen().say((f"{words}: ", STYLES[finding.level]), finding.headline)
        for name, path in written.items():
            Screen().say(f"{name:>12}  {path}")
    for gate in [gate for gate, holds in closed.items() if holds]:
        reason = f"it is {values[gate]:.4g}"
        if isnan(values[gate]):
            unknown = gate.unknown(*tables.values())
            reason = f"{len(unknown)} values are unknown, the first is that of {unknown[0]}"
        screen.say(("gate closed:", "bold red"), f" {gate}, {reason}")


def parse_alpha(text: str | None) -> float | str | None:
    """The number, or ``"rank"``, of ``--alpha``."""
    if text is None or text == "rank":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--alpha is {text!r}: give a number, or rank") from None


def _print_summary(spectra: pd.DataFrame) -> None:
    """Print means over layers of what each task added, one row per task."""
    rows = spectra[spectra["update"] == "task"]
    means = rows.groupby(["run", "task", "metric"], sort=False)["value"].mean().unstack()
    means = means.reindex(columns=[metric for metric, _, _ in SHOWN])
    names = ["run", "task"] if rows["run"].nunique() > 1 else ["task"]
    cells = []
    for index, values in means.iterrows():
        numbers = ("–" if isnan(values[metric]) else format(values[metric], form) for metric, _, form in SHOWN)
        cells.append((*map(str, index[-len(names) :]), *numbers))  # type: ignore[index]  # (run, task)
    headings = (*names, *(heading for _, heading, _ in SHOWN))
    print_table("what each task added, mean over layers", headings, cells, leading=len(names))


def _print_beyond_noise(noise: pd.DataFrame) -> None:
    """Print in how many layers of each task a direction is stronger than random factors explain."""
    known = noise[noise["p"].notna()]
    parts = [
        f"{task} in {int((rows['beyond'] > 0).sum())} of {len(rows)} layers"
        for task, rows in known.groupby("task", sort=False)
    ]
    if parts:
        more = f" and {len(parts) - 4} more tasks" if len(parts) > 4 else ""
        Screen().say(f"leading direction beyond noise: {'; '.join(parts[:4])}{more}")
