"""``manifold-cl analyze``: spectra and interference of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from manifold_cl.cli.screen import Words, bars, check_device, check_out, output, screen

if TYPE_CHECKING:
    import pandas as pd

GATE_CLOSED = 3
"""Exit code when a ``--fail-if`` condition is met; everything has been written by then."""
SHOWN = (
    ("entropy_energy_normalized", "entropy / ln r", ".3f"),
    ("effective_rank_energy", "effective rank", ".2f"),
    ("stable_rank", "stable rank", ".2f"),
    ("top1_energy", "energy in σ₁", ".1%"),
    ("frobenius", "‖ΔW‖", ".3g"),
)


def analyze(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run folders; or adapters of any format, PEFT's too, in the order of their tasks."),
    ],
    out: Annotated[Path, typer.Option(help="Where the report and the tables go.")] = Path("analysis-report"),
    device: Annotated[str, typer.Option(help="Where it is computed, such as cpu or cuda.")] = "cpu",
    tasks: Annotated[
        str | None,
        typer.Option(help="Names of the tasks with commas, in the order of the paths; run folders keep their own."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the base model: for DoRA, OSF, dense checkpoints, and ratios to the weights."),
    ] = None,
    protected: Annotated[
        Path | None,
        typer.Option(help="Folder with memory.json, or a run: subspaces for leakage, instead of those that runs hold."),
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Analyse only the layers that all tasks have in common.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Rank to which dense differences are cut.")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="Alpha where a Kohya file has none: a number, or rank for scaling 1.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Regular expression: layers of dense checkpoints.")] = None,
    transposed: Annotated[
        str | None,
        typer.Option(help="Regular expression: layers whose base weight is stored inputs by outputs (Conv1D)."),
    ] = None,
    memory: Annotated[float, typer.Option(help="Budget of a computation in GB.")] = 2.0,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 3 if this holds or is unknown, such as 'entropy_min<0.5'; repeat for several."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON; tables as JSON too.")] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Write tables as CSV (the default if no other is chosen).")
    ] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write tables as Parquet (needs pyarrow).")] = False,
) -> None:
    """Spectra and interference of adapters: an HTML report and tidy tables.

    Exit codes: 0 done, 2 wrong or missing input, 3 a --fail-if condition holds, 130 interrupted.
    """
    import pandas as pd

    from analysis import Gate, read_protected, write_report, write_table
    from analysis.report import read_subjects
    from analysis.tables.files import need_parquet
    from analysis.tables.spectrum_table import left_out

    check_device(device)
    check_out(out)
    gates = [Gate.parse(text) for text in fail_if or []]
    if parquet:
        need_parquet()
    if not memory > 0:
        raise ValueError(f"--memory is {memory:g} GB: give a positive number")
    options = {"base": base, "common": common, "rank": rank, "alpha": _alpha(alpha), "layers": layers}
    options["transposed"] = transposed
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else None
    subjects = read_subjects(paths, tasks=names, **options)
    bases = read_protected(protected) if protected is not None else None
    if not any(subject.adapters is not None for subject in subjects):
        raise ValueError(f"no adapters in {', '.join(map(str, paths))}: these runs saved none")
    given = (notice for subject in subjects if subject.adapters is not None for notice in subject.adapters.notices)
    notices = list(dict.fromkeys(given))
    for notice in notices:
        screen.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)
    tables: dict[str, list[pd.DataFrame]] = {}
    zeros: list[str] = []
    with _progress() as step:
        for subject in subjects:
            if subject.adapters is not None:
                for name, table in _tables(subject.adapters, device, base, bases, int(memory * 2**30), step).items():
                    tables.setdefault(name, []).append(table.assign(run=subject.label))
                zeros += left_out(subject.adapters, tables["spectra"][-1])
        together = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
        # before anything is written: a metric that does not exist is wrong input
        judged = [(gate, gate.value(*together.values())) for gate in gates]
        closed = [gate for gate in gates if gate.fails(*together.values())]
        out.mkdir(parents=True, exist_ok=True)
        endings = [*([".json"] if as_json else []), *([".parquet"] if parquet else [])]
        endings = [*([".csv"] if csv or not endings else []), *endings]
        written = {
            f"{name}{'' if len(endings) == 1 else ending}": write_table(table, out / f"{name}{ending}")
            for name, table in together.items()
            for ending in endings
        }
        budget = int(memory * 2**30)
        report = write_report(
            out / "report.html", subjects, device=device, protected=bases, memory=budget, progress=step("report")
        )
    written = {"report": report, **written}
    if zeros:
        more = f" and {len(zeros) - 1} more" if len(zeros) > 1 else ""
        screen.say((f"zero, so without a spectrum: {zeros[0]}{more}", "yellow"))
    if as_json:
        conditions = [
            {"gate": str(gate), "value": None if isnan(value) else value, "holds": gate in closed}
            for gate, value in judged
        ]
        print(
            json.dumps(
                {name: str(path) for name, path in written.items()}
                | {"fail_if": conditions, "zero": zeros, "notices": notices}
            )
        )
    else:
        _print_summary(together["spectra"])
        for name, path in written.items():
            screen.say(f"{name:>12}  {path}")
    for gate, value in judged:
        if gate in closed:
            found = f"it is {value:.4g}"
            if isnan(value):
                unknown = gate.unknown(*together.values())
                found = f"{len(unknown)} values are unknown, the first is that of {unknown[0]}"
            screen.say(("gate closed:", "bold red"), f" {gate}, {found}")
    if closed:
        raise SystemExit(GATE_CLOSED)


def _tables(
    adapters: Any, device: str, base: Path | None, bases: Any, memory: int, step: Callable[[str], Any]
) -> dict[str, pd.DataFrame]:
    from analysis import Checkpoint, against_chance, component_table, interference_table, spectrum_table

    checkpoint = Checkpoint.load(base) if base is not None else None
    spectra = spectrum_table(adapters, device, base=checkpoint, zeros="omit", memory=memory, progress=step("spectra"))
    meetings = interference_table(adapters, device, protected=bases, memory=memory, progress=step("interference"))
    tested = against_chance(meetings)
    columns = ["z", "p", "p_holm"]
    meetings[columns] = tested[columns].reindex(meetings.index)
    components = component_table(adapters, device, protected=bases, memory=memory)
    return {"spectra": spectra, "interference": meetings, "components": components}


def _alpha(text: str | None) -> float | str | None:
    if text is None or text == "rank":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--alpha is {text!r}: give a number, or rank") from None


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Bars on a terminal, one a table; nothing elsewhere."""
    columns = (Words("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with bars(*columns) as progress:

        def step(name: str) -> Callable[[int, int], None]:
            bar = progress.add_task(name, total=None)
            return lambda done, total: progress.update(bar, completed=done, total=total)

        yield step


def _print_summary(spectra: pd.DataFrame) -> None:
    """Means over layers of what each task added, a row a task."""
    rows = spectra[spectra["update"] == "task"]
    means = rows.groupby(["run", "task", "metric"], sort=False)["value"].mean().unstack()
    means = means.reindex(columns=[metric for metric, _, _ in SHOWN])
    several = rows["run"].nunique() > 1
    table = Table(title="what each task added, mean over layers", title_justify="left")
    for column in (*(["run"] if several else []), "task", *(heading for _, heading, _ in SHOWN)):
        table.add_column(column, justify="left" if column in ("run", "task") else "right")
    for place in range(len(means)):
        run, task = means.index[place]
        values = [(float(means[metric].iloc[place]), form) for metric, _, form in SHOWN]
        numbers = ("–" if isnan(value) else format(value, form) for value, form in values)
        table.add_row(*([str(run)] if several else []), str(task), *numbers)
    output(120).print(table)
