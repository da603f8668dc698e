"""``manifold-cl analyze merge``: interference before a merge, weights for it, and merged adapters by several rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from manifold_cl.cli.analyze.reading import (
    Alpha,
    Base,
    Common,
    Layers,
    Rank,
    TaskNames,
    Transposed,
    counting,
    print_findings,
    print_notices,
    print_paths,
    reading_options,
    require_adapters,
    write_tables,
)
from manifold_cl.cli.analyze.summary import entries, print_summary
from manifold_cl.cli.model_data import Data, Examples, Model, read_model_data
from manifold_cl.cli.options import Device, Json, Renames, Seed, split_names, validate_device, validate_new
from manifold_cl.cli.screen import bars, print_table, screen
from manifold_cl.rules import validate_share

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from manifold_cl.cli.analysis_package import analysis


class Rule(StrEnum):
    """A rule that makes one update of several."""

    SUM = "sum"
    MEAN = "mean"
    WEIGHTED = "weighted"
    TIES = "ties"
    DARE = "dare"
    DARE_TIES = "dare_ties"
    MAGNITUDE = "magnitude"


class Criterion(StrEnum):
    """The error that recommended weights make small."""

    MEAN = "mean"
    WORST = "worst"


LINEAR = (Rule.SUM, Rule.MEAN, Rule.WEIGHTED)
"""Rules that need no library; the others are PEFT's."""
DENSITY = 0.2
"""Share of entries that rules keep without ``--density``."""
USUAL = (*LINEAR, Rule.TIES, Rule.DARE)
"""Rules without ``--rule``."""


Rules = Annotated[
    list[Rule] | None,
    Option("--rule", metavar="RULE", help=f"{', '.join(Rule)}; repeatable (default: {', '.join(USUAL)})."),
]
Weights = Annotated[
    str | None, Option(help="Weights of rule weighted with commas, one per task (default: recommended ones).")
]
Recommended = Annotated[
    Criterion, Option(metavar="CRITERION", help="Recommended weights minimise the mean or the worst error.")
]


def merge(
    paths: Annotated[list[Path], Argument(help="Two or more adapters of any format, or folders of them, or runs.")],
    out: Annotated[Path, Option(help="New folder for the merged adapters, tables and the page.")] = Path("merged"),
    rules: Rules = None,
    weights: Weights = None,
    criterion: Recommended = Criterion.MEAN,
    density: Annotated[
        float | None, Option(help="Share of the entries that ties, dare and magnitude keep (default: 0.2).")
    ] = None,
    max_rank: Annotated[int | None, Option(help="Highest rank of a merged adapter (default: sum of ranks).")] = None,
    seed: Seed = 0,
    model: Model = None,
    data: Data = None,
    examples: Examples = 128,
    device: Device = "cpu",
    tasks: TaskNames = None,
    base: Base = None,
    common: Common = False,
    rank: Rank = None,
    alpha: Alpha = None,
    layers: Layers = None,
    transposed: Transposed = None,
    rename: Renames = None,
    as_json: Json = False,
) -> None:
    """Merge adapters by several rules, with what each does to every task, and interference beforehand.

    With --model and --data TASK=FILE for each task, errors and weights are those on the tasks' own inputs, and every
    rule's answers are compared with those of each task's own adapter. Without, inputs count as white noise. Every
    rule's adapter is a LoRA folder that PEFT loads. Exit codes: 0 done, 2 wrong or missing input, 130 interrupted.
    """
    from manifold_cl.cli.analysis_package import analysis

    require_adapters(paths, "two or more adapters, or a folder of them", base=base)
    validate_new(out)
    validate_device(device)
    chosen = _chosen(rules)
    _validate_used(chosen, weights, density)
    density = DENSITY if density is None else density
    validate_share("--density", density, one=False)
    options = reading_options(alpha, rename, base=base, common=common, rank=rank, layers=layers, transposed=transposed)
    adapters = analysis.AdapterSet.load(*paths, tasks=split_names(tasks), **options)
    if len(adapters.tasks) < 2:
        raise ValueError(f"{paths[0]} holds one adapter, {adapters.tasks[0]}: a merge needs two or more")
    given = _weights(weights, adapters.tasks)
    inputs = read_model_data(model, data, examples=examples, device=device)
    batches = _by_task(inputs[1], adapters.tasks) if inputs is not None else None
    notices = dict.fromkeys(adapters.notices)

    def moments(updates: analysis.AdapterSet) -> list[Any] | None:
        if inputs is None or batches is None:
            return None
        found = [analysis.activations.input_moments(inputs[0], updates, batches[task]) for task in adapters.tasks]
        left_out = {layer: reason for each in found for layer, reason in each.left_out.items()}
        notices.update({f"no inputs measured of {layer}: {reason}": None for layer, reason in left_out.items()})
        return found

    tables, merged = _measured(
        adapters, moments, lambda found: _functions(chosen, given or found, density, seed), criterion, max_rank, device
    )
    if inputs is not None and batches is not None:
        tables = replace(tables, answers=_answers(inputs[0], adapters, merged, batches))
    print_notices(notices)
    written = _write(out, tables, merged, f"Merge of {', '.join(adapters.tasks)}", list(notices))
    _print_results(out, adapters, tables, written, list(notices), as_json=as_json)


def _validate_used(rules: Sequence[Rule], weights: str | None, density: float | None) -> None:
    """ValueError for an option that none of the rules uses."""
    weighted = [rule for rule in Rule if rule not in (Rule.SUM, Rule.MEAN) and "ties" not in rule]
    sparse = [rule for rule in Rule if rule not in LINEAR]
    for option, given, using in (("--weights", weights, weighted), ("--density", density, sparse)):
        if given is not None and not set(using) & set(rules):
            raise ValueError(f"{option} {given} is used by no --rule given: add one of {', '.join(using)}")


def _weights(text: str | None, tasks: Sequence[str]) -> dict[str, float] | None:
    """Task to weight, from ``0.7,0.3``."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(tasks) or not all(map(isfinite, numbers)) or not any(numbers):
        remedy = f"give {len(tasks)} numbers with commas, not all 0, in the order {', '.join(tasks)}"
        raise ValueError(f"--weights is {text!r}: {remedy}")
    return dict(zip(tasks, numbers, strict=True))


def _by_task(batches: Mapping[str, Any], tasks: Sequence[str]) -> Mapping[str, Any]:
    """The batches, after a check that every task has its own."""
    if differing := sorted(set(batches) ^ set(tasks)):
        remedy = " ".join(f"--data {task}=FILE" for task in tasks)
        raise ValueError(f"--data: {differing[0]!r} has no file or is no task; every task needs its own: {remedy}")
    return batches


def _chosen(rules: Sequence[Rule] | None) -> list[Rule]:
    """The rules in their order; without PEFT and without a choice, the linear ones."""
    if rules:
        return list(dict.fromkeys(rules))
    if find_spec("peft") is None:
        left_out = ", ".join(rule for rule in USUAL if rule not in LINEAR)
        screen.say(("without PEFT:", "yellow"), f" {left_out} left out (pip install 'peft>=0.21,<0.22')")
        return list(LINEAR)
    return list(USUAL)


def _functions(
    rules: Sequence[Rule], weights: Mapping[str, float], density: float, seed: int
) -> dict[str, Mapping[str, float] | Callable[..., Any]]:
    """Name to weights or function, as `analysis.adapters.merged` takes them.

    TIES averages the entries that agree, so its weights are 1; the other rules take the weights of a sum.
    """
    from manifold_cl.adapters.merge_rules import entry_rule

    linear: dict[Rule, Mapping[str, float]] = {
        Rule.SUM: dict.fromkeys(weights, 1.0),
        Rule.MEAN: dict.fromkeys(weights, 1 / len(weights)),
        Rule.WEIGHTED: weights,
    }
    made: dict[str, Mapping[str, float] | Callable[..., Any]] = {}
    for rule in rules:
        if rule in linear:
            made[rule.value] = linear[rule]
        else:
            factors = [1.0] * len(weights) if "ties" in rule else list(weights.values())
            made[rule.value] = entry_rule(rule.value, factors, density=density, seed=seed)
    return made


def _measured(
    adapters: analysis.AdapterSet,
    moments: Callable[[analysis.AdapterSet], list[Any] | None],
    functions: Callable[[Mapping[str, float]], Mapping[str, Any]],
    criterion: Criterion,
    max_rank: int | None,
    device: str,
) -> tuple[analysis.report.MergeTables, analysis.AdapterSet]:
    """All tables, and the merged adapters."""
    import pandas as pd

    from manifold_cl.cli.analysis_package import analysis

    tables = analysis.tables
    with bars(counted=True) as progress:
        bars_of = {name: progress.add_task(name, total=None, note="", left="") for name in ("signs", "merge")}

        def shown(name: str) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(bars_of[name], completed=done, total=total)

        before = moments(adapters)
        weights = tables.merge_weights(adapters, before, criterion=criterion.value)
        conflicts = tables.sign_conflicts(adapters, device, progress=shown("signs"))
        pairs = pd.concat([analysis.AdapterTables(adapters, device).interference, conflicts], ignore_index=True)
        rules = functions(dict(zip(weights["task"], weights["weight"], strict=True)))
        merged = analysis.adapters.merged(adapters, rules, rank=max_rank, device=device, progress=shown("merge"))
        both = tables.together(adapters, merged.adapters)
        spectra = tables.spectrum_table(both, device, zeros="omit")
        drift = None if before is None else tables.drift_table(adapters, dict(zip(adapters.tasks, before, strict=True)))
        found = analysis.report.MergeTables(
            interference=analysis.against_chance(pairs),
            weights=weights,
            losses=tables.merge_table(adapters, merged.adapters, moments(both)),
            spectra=spectra[spectra["update"] == "task"].reset_index(drop=True),
            kept=merged.kept,
            drift=drift,
        )
    return found, merged.adapters


def _answers(
    network: nn.Module, adapters: analysis.AdapterSet, merged: analysis.AdapterSet, batches: Mapping[str, Any]
) -> pd.DataFrame:
    """The answers of every rule against those of each task's own adapter."""
    from manifold_cl.cli.analysis_package import analysis

    with counting("answers") as count:
        return analysis.activations.merged_answers(network, adapters, merged, batches, progress=count)


def _write(
    out: Path, tables: analysis.report.MergeTables, merged: analysis.AdapterSet, title: str, notices: Sequence[str]
) -> dict[str, Path]:
    """Write adapters, tables and page: all of them or nothing."""
    from manifold_cl.cli.analysis_package import analysis

    with analysis.files.new_folder(out) as folder:
        merged.save(folder / "adapters")
        analysis.report.write_merge_report(folder / "report.html", tables, title=title, notices=notices)
        write_tables(folder, tables.named)
    folders = sorted(path for path in (out / "adapters").iterdir() if path.is_dir())
    by_rule = dict(zip(merged.tasks, folders, strict=True))
    return {"report": out / "report.html", **by_rule, **{name: out / f"{name}.csv" for name in tables.named}}


def _print_results(
    out: Path,
    adapters: analysis.AdapterSet,
    tables: analysis.report.MergeTables,
    written: Mapping[str, Path],
    notices: Sequence[str],
    *,
    as_json: bool,
) -> None:
    from manifold_cl.cli.analysis_package import analysis

    findings = analysis.report.merge_findings(tables)
    if as_json:
        weights = dict(zip(tables.weights["task"], tables.weights["weight"], strict=True))
        left_out = entries(adapters.left_out)
        print_summary(out, written, findings, notices=notices, left_out=left_out, further={"weights": weights})
        return
    print_findings(findings)
    print_table("error of every task (0: as with its own adapter, 1: as without)", *_errors(tables.losses))
    print_paths(written)


def _errors(losses: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: rule, and per task the error with its interval."""
    errors = losses[losses["metric"] == "error"]
    tasks = list(dict.fromkeys(errors["task"]))
    rows = []
    for rule, group in errors.groupby("rule", sort=False):
        cells = []
        for value, low, high in group[["value", "ci_low", "ci_high"]].to_numpy(dtype=float).tolist():
            cells.append(f"{value:.2f}" + ("" if isnan(low) else f" [{low:.2f}, {high:.2f}]"))
        rows.append([str(rule), *cells])
    return ["rule", *tasks], rows
