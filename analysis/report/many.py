"""One self-contained HTML page about a collection of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import analysis.plots as plots
from analysis.names import listed
from analysis.report.page import number, write_page
from analysis.statistics import FEWEST
from analysis.tables.titles import TITLES

if TYPE_CHECKING:
    from analysis.many import CollectionTables

MEMBER_COLUMNS = (
    ("cluster", "cluster", ".0f", "number of the cluster; 0 for a member of none"),
    ("overlap", "overlap, mean", ".3f", "mean overlap with all other members"),
    ("nearest_overlap", "overlap, nearest", ".3f", "overlap with the nearest member"),
    ("rank", "rank", ".0f", "largest rank of the update over layers"),
    ("frobenius", "‖ΔW‖", ".3g", "norm of the update over all layers"),
    ("entropy_energy_normalized", "entropy / ln\u00a0r", ".3f", "1 for a flat spectrum, mean over layers"),
    ("effective_rank_energy", "effective rank", ".2f", "exponential of the entropy of energy shares, mean over layers"),
    ("top1_energy", TITLES["top1_energy"], ".1%", "share of the energy in the leading direction, mean over layers"),
    ("zero_layers", "zero layers", ".0f", "layers that the adapter does not change"),
)
LEVELS = ("0.5", "0.9", "0.99")


def write_many_report(path: str | Path, tables: CollectionTables, *, title: str | None = None) -> Path:
    """The path of a new page about a collection: findings first, then figures, outliers, members and layers."""
    curves = tables.curves
    return write_page(
        path,
        "many.html.j2",
        title=title or f"{len(tables.names)} adapters",
        findings=many_findings(tables),
        dendrogram=plots.plot_dendrogram(tables),
        curves=None if curves.empty else plots.plot_common_directions(curves),
        measured=0 if curves.empty else curves["layer"].nunique(),
        side=tables.side,
        cut=tables.tree.cut,
        tested=len(tables.names) >= FEWEST,
        fewest=FEWEST,
        outliers=tables.found_outliers.assign(metric=lambda rows: rows["metric"].map(_title)).to_dict("records"),
        members=tables.members.to_dict("records"),
        columns=MEMBER_COLUMNS,
        layers=tables.layers.to_dict("records"),
        levels=LEVELS,
        left_out=tables.left_out,
        notices=tables.notices,
    )


def many_findings(tables: CollectionTables) -> list[dict[str, str]]:
    """The findings, one sentence each, with numbers and what to do."""
    return [each for each in (_related(tables), _shared(tables), _strange(tables), _omitted(tables)) if each]


def _related(tables: CollectionTables) -> dict[str, str]:
    total, beyond = len(tables.pairs), tables.related_pairs
    sizes = [int((tables.tree.clusters == index).sum()) for index in range(1, int(tables.tree.clusters.max()) + 1)]
    detail = (
        f"{beyond} of {total} pairs overlap beyond chance (Holm over all pairs, 5 %). Mean overlap of two members: "
        f"{tables.pairs['overlap'].mean():.3f}, by chance {tables.pairs['chance'].mean():.3f}."
    )
    if not sizes:
        return {
            "headline": "No cluster of related adapters.",
            "detail": detail,
            "action": "Treat the adapters as unrelated.",
        }
    plural, shown = "s" if len(sizes) > 1 else "", listed([str(size) for size in sizes], 8)
    what = f"{len(sizes)} cluster{plural} of related adapters; members: {shown}."
    alone = int((tables.tree.clusters == 0).sum())
    follows = "Compare or merge within a cluster first; the column “cluster” names the members."
    detail += f" {alone} member{'s are' if alone > 1 else ' is'} in no cluster." if alone else ""
    return {"headline": what, "detail": detail, "action": follows}


def _shared(tables: CollectionTables) -> dict[str, str] | None:
    known = tables.layers.dropna(subset="directions_0.9") if "directions_0.9" in tables.layers else tables.layers[:0]
    if known.empty:
        return None
    needed, random = known["directions_0.9"].astype(float), known["random_0.9"].astype(float)
    what = f"{needed.median():.0f} common directions hold 90 % of the energy of all updates."
    span = f"from {needed.min():.0f} to {needed.max():.0f} over {len(known)} layers"
    detail = f"Median over layers, {span}; random members of these spectra would need {random.median():.0f}."
    close = needed.median() > 0.8 * random.median()
    follows = (
        "A common basis would save little: the adapters mostly use directions of their own."
        if close
        else "A common basis of that size holds all of them, with a tenth of their energy lost."
    )
    return {"headline": what, "detail": detail, "action": follows}


def _strange(tables: CollectionTables) -> dict[str, str]:
    found = tables.found_outliers
    if len(tables.names) < FEWEST:
        what = f"Fewer than {FEWEST} members: outliers are not tested."
        return {"headline": what, "detail": "", "action": "Compare the rows of the table of members."}
    if found.empty:
        detail = (
            "Norm, entropy, energy of the leading direction, and mean overlap were tested (5 %, all tests together)."
        )
        return {"headline": "No member differs from all others.", "detail": detail, "action": "Nothing to inspect."}
    names = list(dict.fromkeys(found["member"]))
    first = found.iloc[0]
    detail = (
        f"{names[0]}: {_title(str(first['metric']))} is {number(first['value'], '.3g')}, the median is "
        f"{number(first['median'], '.3g')} (adjusted p {first['p_adjusted']:.1e})."
    )
    what = f"{len(names)} member{'s differ' if len(names) > 1 else ' differs'} from the others: {listed(names)}."
    return {
        "headline": what,
        "detail": detail,
        "action": "Look at its training before you use it: rate, data, or divergence.",
    }


def _omitted(tables: CollectionTables) -> dict[str, str] | None:
    if not tables.left_out:
        return None
    names = [each.name for each in tables.left_out]
    detail = tables.left_out[0].reason if len(names) == 1 else f"{names[0]}: {tables.left_out[0].reason}"
    return {"headline": f"Left out: {listed(names)}.", "detail": detail, "action": "The reasons are listed at the end."}


def _title(metric: str) -> str:
    return "mean overlap with the others" if metric == "overlap" else TITLES.get(metric, metric)
