"""docs/causes.md and its figures, from committed records and result files (python benchmarks/causes.py page)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import StudyResults
from analysis.causes import change_effects, changed_table, factor_effects, layer_table, mediation_table, spectra_table
from analysis.plots import plot_dose_response, plot_mediation, plot_sizes
from analysis.statistics import holm
from analysis.studies import paired_test
from manifold_cl.files import FileError

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PROSE = HERE / "causes_prose.md"
TABLES = "tables.json"
COMMITTED = HERE / "results" / "text-six"
CONTRASTS = {
    "flattened before the merge": ("svd_eq", "sequential_merge"),
    "balanced while it trains": ("balanced", "sequential_merge"),
    "protected, with a balanced core": ("eblora", "balanced"),
    "balanced, under protection": ("eblora", "restricted"),
    "both": ("eblora", "sequential_merge"),
}
"""Change of one thing, as far as named methods differ in one → the label with it, and the label without."""
SCORES = {"mfn": "Δ MFN", "bwt": "Δ BWT", "mft": "Δ MFT", "fwt": "Δ FWT"}
LEVELS = {
    "core": ("scalar", "diagonal", "full"),
    "restriction": ("none", "input"),
    "start": ("random", "task"),
    "norm": ("free", "imposed"),
}
SHAPED = "sequential_merge"
MEASURES = ("entropy", "between_layers", "frobenius", "spectral", "nuclear")


def write(folder: Path, docs: Path = DOCS) -> None:
    """Write tables, figures and the page; FileError, before anything is written, for a folder without results."""
    figures: dict[str, Figure] = {}
    tables = {"contrasts": contrasts(COMMITTED), "main": measured(folder, figures), "effects": []}
    tables["pilot"] = measured(folder / "pilot", figures, suffix="-pilot")
    if (study := folder / "factorial" / "study.json").exists():
        results = StudyResults.load(study)
        factors = {label: dict(zip(LEVELS, label.split("-"), strict=True)) for label in results.methods}
        tables["effects"] = rows_of(factor_effects(results, LEVELS, factors, figures=tuple(SCORES)))
    if not any(rows for part in (tables["main"], tables["pilot"]) for rows in part.values()) and not tables["effects"]:
        raise FileError(f"{folder} has no results: measure a study first, or give their folder as --out")
    for name, figure in figures.items():
        save_figure(docs / "_static", figure, name)
    (folder / TABLES).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    (docs / "causes.md").write_text(page(tables), encoding="utf-8")
    print(docs / "causes.md")


def measured(folder: Path, figures: dict[str, Figure], suffix: str = "") -> dict[str, Any]:
    """The tables of one folder of result files; figures of what there is are added to ``figures``."""
    kinds = ("spectra", "changed", "layers")
    spectra, changed, layers = (sorted((folder / kind).glob("*.json")) for kind in kinds)
    tables: dict[str, Any] = {"spectra": spectra_rows(spectra_table(spectra)), "changed": [], "layers": [], "sums": {}}
    if changed:
        effects = change_effects(changed_table(changed))
        tables["changed"] = rows_of(effects)
        figures[f"causes-sizes{suffix}"] = plot_sizes(effects, list(dict.fromkeys(effects["method"])))
        if SHAPED in set(effects["method"]):
            figures[f"causes-shapes{suffix}"] = plot_dose_response(effects, SHAPED)
    if layers:
        mediation = mediation_table(table := layer_table(layers))
        tables["layers"], tables["sums"] = rows_of(mediation), sums(table)
        figures[f"causes-layers{suffix}"] = plot_mediation(mediation)
    return tables


def spectra_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per method: the number of its runs, and means of the measures over tasks and runs."""
    means = table.groupby("method", sort=False).agg({"run": "nunique"} | dict.fromkeys(MEASURES, "mean"))
    return rows_of(means.reset_index())


def spectra_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sizes and shapes of updates, one line per method."""
    if not rows:
        return [NOT_RUN]
    lines = [
        "| method | n runs | entropy within layers | entropy between layers | Frobenius | spectral | nuclear |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        lines.append(f"| `{row['method']}` | {row['run']} | {' | '.join(number(row[each], 2) for each in MEASURES)} |")
    return lines


def sums(table: pd.DataFrame) -> dict[str, Any]:
    """The number of pairs of a task and an earlier one, and how far the parts of layers miss the measured change."""
    pairs = (
        table[table["task"] != table["old"]].groupby(["run", "task", "old"]).agg({"effect": "sum", "change": "first"})
    )
    missed = (pairs["effect"] - pairs["change"]).abs()
    return {"pairs": len(pairs), "missed": plain_value(float(missed.sum() / pairs["change"].abs().sum()))}


def contrasts(folder: Path) -> list[dict[str, Any]]:
    """One row per contrast and score: paired differences with Student's interval, p and Holm's p within a score."""
    table = StudyResults.load(folder).figures()
    rows = []
    for figure in SCORES:
        grid = table[table["figure"] == figure].pivot(index=["order", "seed"], columns="label", values="value")
        tests = {name: paired_test(grid[first], grid[second]) for name, (first, second) in CONTRASTS.items()}
        for (name, test), p_holm in zip(tests.items(), holm([t.p for t in tests.values()]).tolist(), strict=True):
            numbers = {"n": test.n, "difference": test.difference, "low": test.low, "high": test.high, "p": test.p}
            rows.append({"contrast": name, "figure": figure, **numbers, "p_holm": p_holm})
    return [{key: plain_value(value) for key, value in row.items()} for row in rows]


def page(tables: Mapping[str, Any]) -> str:
    """The text of the page: the prose, with its marks replaced by tables."""
    parts = {"contrasts": contrast_lines(tables["contrasts"]), "effects": effect_lines(tables["effects"])}
    for name, suffix in (("main", ""), ("pilot", "-pilot")):
        own = tables[name]
        parts[f"spectra{suffix}"] = spectra_lines(own["spectra"])
        parts[f"changes{suffix}"] = change_lines(own["changed"], suffix)
        parts[f"sizes{suffix}"] = size_lines(own["changed"], suffix)
        parts[f"layers{suffix}"] = layer_lines(own["layers"], own["sums"], suffix)
    text = PROSE.read_text(encoding="utf-8")
    for name, lines in parts.items():
        text = text.replace(f"<!-- table: {name} -->", "\n".join(lines))
    return text


def contrast_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per contrast, with all scores."""
    lines = [f"| what is added | pair | n | {' | '.join(SCORES.values())} |", f"| --- | --- | --: |{' --: |' * 4}"]
    for name, (first, second) in CONTRASTS.items():
        own = {row["figure"]: row for row in rows if row["contrast"] == name}
        cells = [f"{interval(own[f], 'difference', 1)}, p {p_value(own[f]['p_holm'])}" for f in SCORES]
        lines.append(f"| {name} | `{first}` − `{second}` | {own['mfn']['n']} | " + " | ".join(cells) + " |")
    return lines


NOT_RUN = "**Not run yet.** The table and its figure appear here when `python benchmarks/causes.py page` finds results."


def change_lines(rows: Sequence[Mapping[str, Any]], suffix: str) -> list[str]:
    """Effects of changes of shape and directions, and their figure."""
    own = [row for row in rows if row["method"] == SHAPED and not row["change"].startswith(("scale ", "level "))]
    if not own:
        return [NOT_RUN]
    by = {(row["change"], row["outcome"]): row for row in own}
    lines = [
        "| change | entropy | n runs | forgetting, points | Δ forgetting, nats | learning, points | Δ learning, nats |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    norms = ("trained", "frobenius", "spectral", "nuclear")  # others, random directions, come last
    entropies = {row["change"]: row["entropy"] for row in own}
    last = {change: change.split()[-1] for change in entropies}
    place = {change: norms.index(word) if word in norms else len(norms) for change, word in last.items()}
    for change in sorted(entropies, key=lambda each: (place[each], -entropies[each])):
        cells = [
            interval(by[change, "forgetting"], "mean", 1),
            difference(by[change, "forgetting_loss"]),
            interval(by[change, "learning"], "mean", 1),
            difference(by[change, "learning_loss"]),
        ]
        first = by[change, "forgetting"]
        lines.append(f"| {change} | {number(first['entropy'], 2)} | {first['n']} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"![Forgetting and learning against the entropy of changed updates](_static/causes-shapes{suffix}.png)",
    ]


def size_lines(rows: Sequence[Mapping[str, Any]], suffix: str) -> list[str]:
    """Effects of the size alone, one line per method and factor."""
    own = [row for row in rows if row["change"].startswith(("scale ", "level ", "trained"))]
    if not own:
        return [NOT_RUN]
    by = {(row["method"], row["change"], row["outcome"]): row for row in own}
    keys = dict.fromkeys((row["method"], row["change"]) for row in own)
    ordered = sorted(keys, key=lambda key: (list(dict.fromkeys(m for m, _ in keys)).index(key[0]), factor(key[1])))
    lines = [
        "| method | change | norm | between layers | n runs | forgetting, points | learning, points | forgetting, nats "
        "| learning, nats |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for method, change in ordered:
        outcomes = (("forgetting", 1), ("learning", 1), ("forgetting_loss", 3), ("learning_loss", 3))
        cells = [interval(by[method, change, name], "mean", digits) for name, digits in outcomes]
        first = by[method, change, "forgetting"]
        sizes = (number(first["frobenius"], 2), number(first["between_layers"], 2), str(first["n"]))
        lines.append(f"| `{method}` | {change} | {' | '.join((*sizes, *cells))} |")
    return [*lines, "", f"![Forgetting against learning while only the size changes](_static/causes-sizes{suffix}.png)"]


def layer_lines(rows: Sequence[Mapping[str, Any]], sums: Mapping[str, Any], suffix: str) -> list[str]:
    """Partial rank correlations, and their figure."""
    if not rows:
        return [NOT_RUN]
    lines = [
        f"Over {sums['pairs']} pairs, the parts miss the measured changes by {100 * sums['missed']:.0f} % in all.",
        "",
        "| method | measure | n runs | partial rank correlation | p in every run, Holm |",
        "| --- | --- | --: | --: | --: |",
    ]
    for row in rows:
        cells = (f"`{row['method']}`", row["measure"], str(row["n"]), interval(row, "value", 2), p_value(row["p_holm"]))
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"![Partial rank correlations of four measures with forgetting](_static/causes-layers{suffix}.png)",
    ]


def effect_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Main effects and interactions of the factors on MFN."""
    own = [row for row in rows if row["figure"] == "mfn" and row["n"]]
    if not own:
        return [NOT_RUN]
    lines = ["| effect | kind | n | Δ MFN | p, Holm |", "| --- | --- | --: | --: | --: |"]
    for row in own:
        cells = (row["effect"], row["kind"], str(row["n"]), interval(row, "estimate", 1), p_value(row["p_holm"]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def factor(change: str) -> float:
    """The factor of a change of size; 0 for other changes, which come first."""
    return {"trained": 1.0}.get(change, float(change.removeprefix("scale ")) if "scale " in change else 0.0)


def difference(row: Mapping[str, Any]) -> str:
    """The difference from the trained update, with its interval."""
    ends = {"value": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}
    return interval(ends, "value", 3)


def interval(row: Mapping[str, Any], key: str, digits: int) -> str:
    """A number with its interval, alone where there is none."""
    low, high = row["low"], row["high"]
    ends = "" if low is None or high is None else f" [{number(low, digits)}, {number(high, digits)}]"
    return number(row[key], digits) + ends


def number(value: float | None, digits: int) -> str:
    """A rounded number; a dash for an unknown one."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before a zero


def p_value(value: float | None) -> str:
    """A p-value with three digits."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table in plain values."""
    return [{key: plain_value(value) for key, value in row.items()} for row in table.to_dict("records")]


def plain_value(value: Any) -> Any:
    """A value for JSON: rounded to eight digits, None for NaN."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.8g}")
    return value


def save_figure(folder: Path, figure: Figure, name: str) -> None:
    """Write a figure of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    print(folder / f"{name}.png")
