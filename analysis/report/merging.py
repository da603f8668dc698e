"""Sentences and a self-contained HTML page about a merge of adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis import plots
from analysis.report import terms
from analysis.report.page import number, write_page

WITHOUT_DATA = (
    "No inputs were measured. Every input counts as white noise, on which every update acts on every task: errors are "
    "pessimistic, and weights are small. Give --model, and --data TASK=FILE for each task."
)
PAIR_METRICS = {
    "input_overlap": "overlap of inputs",
    "output_overlap": "overlap of outputs",
    "alignment": "cosine of updates",
    "sign_conflict": "opposite signs",
}
CAPTIONS = {
    "error": "Squared difference of the outputs from those with the task's own adapter, relative to that adapter's own "
    "change. 0: the same. 1, dashed: as bad as leaving the task out.",
    "retained": "Share of the task's own change that the merged adapter makes. 1, dashed: all of it.",
}
ALPHA = 0.05


@dataclass(frozen=True)
class MergeTables:
    """The tables of a merge, as the command writes them."""

    interference: pd.DataFrame
    """Pairs of tasks, with chance, z, p and p_holm; sign conflicts too."""
    weights: pd.DataFrame
    """The recommended weights of `analysis.tables.merge_weights`."""
    losses: pd.DataFrame
    """The table of `analysis.tables.merge_table`."""
    spectra: pd.DataFrame
    """Spectra of the updates and of the merged ones."""
    kept: pd.DataFrame
    """The energy that truncation kept, of `analysis.adapters.merged`."""
    drift: pd.DataFrame | None = None
    """The table of `analysis.tables.drift_table`, where inputs were measured."""
    answers: pd.DataFrame | None = None
    """The table of `analysis.activations.merged_answers`, where a model answered examples."""

    @property
    def named(self) -> Mapping[str, pd.DataFrame]:
        """Name of the file to table."""
        tables = {"interference": self.interference, "weights": self.weights, "merge": self.losses}
        tables |= {"spectra": self.spectra, "truncation": self.kept}
        further = {"drift": self.drift, "answers": self.answers}
        return tables | {name: table for name, table in further.items() if table is not None}

    def worst(self) -> pd.DataFrame:
        """The row of the task with the largest error, per rule, the best rule first."""
        errors = self.losses[self.losses["metric"] == "error"]
        return errors.loc[errors.groupby("rule", sort=False)["value"].idxmax()].sort_values("value", ignore_index=True)

    def pairs(self) -> pd.DataFrame:
        """Per pair of tasks and metric: value and chance of all layers together, and layers beyond chance."""
        table = self.interference[self.interference["metric"].isin(PAIR_METRICS)]
        layers = table[table["layer"] != "total"]
        keys = ["task_a", "task_b", "metric"]
        beyond = layers.assign(beyond=layers["p_holm"] < ALPHA).groupby(keys, sort=False)["beyond"]
        counts = beyond.agg(["sum", "count"]).rename(columns={"sum": "beyond", "count": "layers"}).reset_index()
        totals = table[table["layer"] == "total"][[*keys, "value", "chance", "p"]]
        return totals.merge(counts, on=keys, sort=False)


def merge_findings(tables: MergeTables) -> list[str]:
    """Three to five sentences, the most important first: the best rule, weights, interference, and what limits them."""
    worst = tables.worst()
    best, others = worst.iloc[0], worst[1:]
    sentences = [
        f"Rule {best['rule']} has the smallest worst error: {_interval(best)} of a task's own change, of "
        f"{best['task']} (0: as with its own adapter, 1: as if left out)."
    ]
    if len(others):
        listed = "; ".join(f"{row['rule']} {_interval(row)} ({row['task']})" for _, row in others.iterrows())
        close = [str(row["rule"]) for _, row in others.iterrows() if row["ci_low"] <= best["ci_high"]]
        near = f" The intervals of {', '.join(close)} overlap with its own: no clear difference." if close else ""
        sentences[0] += f" Other rules, worst task: {listed}.{near}"
        sentences[0] += " An evaluation of the merged adapters decides."
    lost = tables.kept.groupby("rule", sort=False)["kept"].mean()
    if (lost < 0.99).any():
        listed = ", ".join(f"{rule} {number(100 * share, '.0f')} %" for rule, share in lost.items() if share < 0.99)
        sentences[0] += f" Energy that truncation to the rank keeps: {listed}."
    weights = "; ".join(
        f"{row['task']} {_interval(row)}" for _, row in tables.weights.rename(columns={"weight": "value"}).iterrows()
    )
    sentences.append(f"Recommended weights of a sum: {weights}.")
    if tables.answers is not None:
        sentences.append(_answers_finding(tables.answers))
    sentences.append(WITHOUT_DATA if tables.drift is None else _drift_finding(tables.drift))
    parts = "; ".join(_pair_findings(tables.pairs()))
    sentences.append(f"{parts[0].upper()}{parts[1:]}. Layers count where the Holm-adjusted p is below 0.05.")
    return sentences


def _answers_finding(answers: pd.DataFrame) -> str:
    """The sentence on the rule whose answers are nearest to those with the tasks' own adapters, on the worst task."""
    rows = answers[answers["metric"] == "kl"]
    worst = rows.loc[rows.groupby("rule", sort=False)["value"].idxmax()].sort_values("value", kind="stable")
    rules, base = worst[worst["rule"] != ""], worst[worst["rule"] == ""].iloc[0]
    listed = "; ".join(f"{row['rule']} {_interval(row, '.3f')} ({row['task']})" for _, row in rules.iterrows())
    few = "" if rules["ci_low"].notna().all() else " Intervals need three examples."
    return (
        "Answers: KL divergence (nats) of the model with the merged adapter from that with the task's own, worst task: "
        f"{listed}. Without adapters {_interval(base, '.3f')} ({base['task']}).{few}"
    )


def _drift_finding(drift: pd.DataFrame) -> str:
    """The sentence on the update that changes another task's outputs most, beside that task's own update."""
    other = drift[drift["data"] != drift["task"]]
    row = other.iloc[int(other["value"].to_numpy().argmax())]
    own = drift[(drift["data"] == row["data"]) & (drift["task"] == row["data"])].iloc[0]
    return (
        f"Functional drift: on inputs of {row['data']}, the update of {row['task']} alone changes a layer's output by "
        f"{_interval(row, '.2g')} of its energy, mean over layers; that of {row['data']} by {_interval(own, '.2g')}."
    )


def _pair_findings(pairs: pd.DataFrame) -> list[str]:
    """Per metric, the pair of tasks that is furthest from chance."""
    parts = []
    for metric in ("input_overlap", "sign_conflict"):
        rows = pairs[pairs["metric"] == metric]
        row = rows.iloc[int((rows["value"] - rows["chance"]).abs().to_numpy().argmax())]
        value, chance = number(row["value"], ".3f"), number(row["chance"], ".3f")
        parts.append(
            f"{PAIR_METRICS[metric]} of {row['task_a']} and {row['task_b']}: {value}, chance {chance}, "
            f"beyond chance in {row['beyond']} of {row['layers']} layers"
        )
    return parts


def _interval(row: pd.Series, form: str = ".2f") -> str:
    value, low, high = (number(row[column], form) for column in ("value", "ci_low", "ci_high"))
    return value if pd.isna(row["ci_low"]) else f"{value} [{low}, {high}]"


def write_merge_report(path: str | Path, tables: MergeTables, *, title: str, notices: Sequence[str] = ()) -> Path:
    """The path of a new HTML page: findings, the figure of errors, spectra, and every table folded below."""
    shown = tables.spectra[tables.spectra["metric"] == "entropy_energy_normalized"]
    spectra = tables.spectra.groupby(["task", "metric"], sort=False)["value"].mean().unstack()
    columns = ["frobenius", "effective_rank_energy", "stable_rank", "top1_energy", "entropy_energy_normalized"]
    worst = tables.worst()
    pictures = []
    for metric in ("error", "retained"):
        drawing = plots.plot_merge(tables.losses, metric=metric)
        rule = worst["rule"].iloc[0]
        chosen = tables.losses[(tables.losses["metric"] == metric) & (tables.losses["rule"] == rule)]
        values = ", ".join(f"{row['task']} {number(row['value'], '.2f')}" for _, row in chosen.iterrows())
        shown_as = CAPTIONS[metric].partition(".")[0]
        alt = f"{shown_as}, per rule and task; rule {rule}, with the smallest worst error: {values}."
        pictures.append((drawing, alt, CAPTIONS[metric]))
    ranks = tables.kept.groupby("rule", sort=False)["rank"].max()
    return write_page(
        path,
        "merge.html.j2",
        title=title,
        findings=merge_findings(tables),
        notices=notices,
        pictures=pictures,
        terms=terms,
        spectra=spectra.reindex(columns=columns, index=list(dict.fromkeys(shown["task"]))),
        ranks=ranks.to_dict(),
        pairs=tables.pairs().assign(metric=lambda table: table["metric"].map(PAIR_METRICS)),
        losses=tables.losses,
        weights=tables.weights,
        drift=tables.drift,
        answers=tables.answers,
    )
