"""Findings about the weights of a set of adapters: relations beyond chance, protection, spectra."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

import analysis.plots as plots
from analysis.report.findings.finding import Finding, percent, probability
from analysis.report.findings.spikes import spike_findings
from analysis.statistics.pairs import relations, strongest
from analysis.tables.adapter_tables import AdapterTables
from analysis.tables.titles import TITLES

SHARES = ("input_overlap", "output_overlap", "backward", "alignment")
LEVEL = 0.05
WORDS = {
    "input_overlap": "use {value} of their input directions in common",
    "output_overlap": "write to {value} of their output directions in common",
    "backward": "overlap: {value} of the later update's energy acts on inputs that the earlier one uses",
    "alignment": "have a cosine of {value}",
}
MERGING = "`manifold-cl analyze merge` predicts what adding them does; `--model` and `--data` measure it on examples."


def weight_findings(label: str, tables: AdapterTables) -> Iterator[Finding]:
    """The findings about one set of adapters that its weights alone give."""
    table = relations(tables.against_chance, tables.noise)
    if len(tables.adapters.tasks) > 1:
        yield from _related(label, tables, table)
    yield from _protected(label, tables, table)
    yield from spike_findings(label, tables, table)
    yield from _spectrum(label, tables)


def unknown_forgetting(label: str, tables: AdapterTables) -> Finding:
    """The finding that weights alone do not show forgetting."""
    several = len(tables.adapters.tasks) > 1
    return Finding(
        kind="unknown",
        level="unknown",
        headline="Whether anything is forgotten cannot be judged from weights alone.",
        number="not measured",
        interval="none",
        certainty="Updates whose directions overlap no more than chance can still destroy what was learned before: how "
        "much depends on the inputs that the model sees."
        + (" No finding below is a sign of safety." if several else ""),
        action="Give the model and examples: `--model NAME_OR_PATH --data TASK=FILE.jsonl`. The page then starts with "
        "how the answers on these examples change.",
        subject=label,
    )


def _related(label: str, tables: AdapterTables, table: pd.DataFrame) -> Iterator[Finding]:
    """Whether pairs of tasks are related beyond chance."""
    row = strongest(table, SHARES)
    if row is None:
        return
    tested = table[table["metric"].isin(SHARES)]
    pairs = tested.groupby(["task_a", "task_b"])["p"].min()
    if not (found := int((pairs < LEVEL).sum())):  # the metric that is known best
        row = tested[tested["metric"] == "input_overlap"].sort_values("value").iloc[-1]
    metric, a, b = str(row["metric"]), str(row["task_a"]), str(row["task_b"])
    signed = metric == "alignment"
    form = (lambda value: f"{value:+.3f}".replace("-", "−")) if signed else percent
    value, chance = form(row["value"]), form(row["chance"]) if not signed else "0"
    band = f"random updates: {form(row['low'])} to {form(row['high'])} (95 %)"
    against = tables.against_chance
    shared: dict[str, Any] = {
        "kind": "relations",
        "subject": label,
        "number": f"{value} (chance {chance})",
        "interval": band,
        "draw": lambda: plots.plot_against_chance(against, metric=metric, task_a=a, task_b=b),
    }
    alone = f"{row['below']} of {row['layers']} layers are beyond chance on their own"
    if found:
        some = (
            f"{found} of {len(pairs)} pairs of updates {'are' if found > 1 else 'is'}"
            if len(pairs) > 1
            else "The two updates are"
        )
        opposite = signed and row["value"] < 0
        yield Finding(
            level="act" if opposite or abs(row["value"]) > 2 * max(row["high"], 0.05) else "note",
            headline=f"{some} related beyond chance: “{a}” and “{b}” {WORDS[metric].format(value=value)}"
            f"{', so that the later one takes back a part of the earlier one' if opposite else ''}.",
            certainty=f"{probability(row['p'])} after Holm's adjustment for all pairs, metrics and layers; {alone}. "
            "A small p means related directions, and no large effect: its size is the number.",
            action=MERGING,
            beyond_chance=True,
            alt=f"{TITLES[metric]} of “{a}” and “{b}” per layer: {value} in total, random updates {form(row['low'])} "
            f"to {form(row['high'])}; {alone}.",
            **shared,
        )
        return
    yield Finding(
        level="fine",
        headline="The updates are no more related than random ones: "
        f"“{a}” and “{b}” {WORDS[metric].format(value=value)}, chance gives {chance}.",
        certainty=f"The least p of {len(tested)} tests is {tested['p'].min():.2g} after Holm's adjustment. "
        "This does not show that earlier tasks are kept.",
        action="Measure on examples before you rely on it: `--model` and `--data`.",
        alt=f"{TITLES[metric]} of “{a}” and “{b}” per layer: {value} in total, inside what random updates give.",
        **shared,
    )


def _protected(label: str, tables: AdapterTables, table: pd.DataFrame) -> Iterator[Finding]:
    """How much of the updates acts on the protected subspace."""
    rows = table[table["metric"] == "leakage"]
    if rows.empty:
        return
    row = rows.sort_values("value", ascending=False).iloc[0]
    leaks, kept = row["p"] < LEVEL, row["value"] < 0.1 * row["chance"]
    value, chance, task = percent(row["value"]), percent(row["chance"]), row["task_b"]
    interference = tables.interference
    yield Finding(
        kind="protection",
        beyond_chance=bool(leaks),
        level="act" if leaks else "fine" if kept else "note",
        headline=f"“{task}” puts {value} of its energy on the protected inputs, the most of {len(rows)} task"
        f"{'s' if len(rows) > 1 else ''}; a random update would put {chance} there.",
        number=f"{value} (chance {chance})",
        interval=f"random updates: up to {percent(row['high'])} (95 %)",
        certainty=f"{probability(row['p'])} for more than chance, adjusted after Holm. "
        "The number is exact. It covers only the directions that are protected.",
        action="Project the update off the protected memory: `manifold-cl analyze mend`."
        if leaks or not kept
        else "Nothing to do for these directions.",
        subject=label,
        draw=lambda: plots.plot_leakage(interference),
        alt=f"Share of each update on the protected inputs: at most {value} (“{task}”), a random update {chance}.",
    )


def _spectrum(label: str, tables: AdapterTables) -> Iterator[Finding]:
    """Over how many directions the energy of the updates spreads."""
    spectra = tables.spectra
    rows = spectra[(spectra["update"] == "task") & (spectra["metric"] == "effective_rank_energy")]
    ranks = [tables.adapters.shape(task, layer)[2] for task, layer in zip(rows["task"], rows["layer"], strict=True)]
    share = rows["value"] / pd.Series(ranks, index=rows.index)
    if rows.empty or max(ranks) < 2:
        return
    task = str(share.groupby(rows["task"], sort=False).mean().idxmin())
    chosen = rows["task"] == task
    values, mean = rows["value"][chosen], float(share[chosen].mean())
    low, high = (float(values.quantile(q)) for q in (0.1, 0.9))
    rank = max(rank for rank, one in zip(ranks, chosen, strict=True) if one)
    number, singular = f"{values.mean():.1f} of {rank}", tables.singular_values
    few = mean < 0.5
    yield Finding(
        kind="spectrum",
        level="note" if few else "fine",
        headline=f"“{task}” has rank {rank} and uses about {values.mean():.1f} directions per layer"
        + (": a lower rank keeps most of it." if few else ": its energy is spread over most of them."),
        number=f"effective rank {number}",
        interval=f"layers: {low:.1f} to {high:.1f} (10th to 90th percentile)",
        certainty="Exact for these weights. The effective rank is e to the entropy of the energy shares σ².",
        action="`manifold-cl analyze suggest` finds a rank per layer that keeps a stated share, with an interval."
        if few
        else "Nothing to gain from a lower rank.",
        subject=label,
        draw=lambda: plots.plot_spectra(singular[singular["task"] == task], task=task, fan=False),
        alt=f"Singular values of “{task}” by index, median over layers: effective rank {number}.",
    )
