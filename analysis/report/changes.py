"""One self-contained HTML page about adapters before and after a change."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.report.page import write_page
from analysis.tables.titles import TITLES

COLUMNS = {
    "rank": ("rank", ".0f", "directions above float32 rounding"),
    "frobenius": ("‖ΔW‖", ".3g", "Frobenius norm of the update"),
    "effective_rank_energy": ("effective rank", ".2f", "exponential of the entropy of the energy shares"),
    "top1_energy": (TITLES["top1_energy"], ".1%", "share of the energy in the largest component"),
    "leakage": ("leakage", ".2%", "share of the energy on protected inputs"),
    "relative_change": ("change", ".2%", "‖ΔW' − ΔW‖ / ‖ΔW‖"),
    "cosine": ("cosine", ".4f", "cosine of the updates before and after"),
}
"""Metric to heading, format and meaning. The last two have no value before."""
ALONE = ("relative_change", "cosine")


class Picture(NamedTuple):
    """A figure with the sentence that says what it shows, and a caption."""

    drawing: Any
    """Axes or a figure."""
    alt: str
    caption: str


def write_change_report(
    path: str | Path,
    changes: pd.DataFrame,
    *,
    title: str,
    findings: Sequence[str],
    pictures: Sequence[Picture] = (),
    notices: Sequence[str] = (),
    extra: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """The path of a new HTML page with findings, figures and the table of `analysis.changes.change_table`.

    Args:
        path: of the page.
        changes: one row per task, layer and metric, with the values before and after.
        title: heading of the page.
        findings: sentences, the most important first.
        pictures: figures with their texts.
        notices: sentences about what was not read.
        extra: heading to a table whose rows are shown as they are.
    """
    known = [metric for metric in COLUMNS if metric in set(changes["metric"])]
    wide = changes.pivot(index=["task", "layer"], columns="metric", values=["before", "after"])
    order = list(dict.fromkeys(zip(changes["task"], changes["layer"], strict=True)))
    rows = [
        (task, layer, {m: tuple(wide.loc[(task, layer), (side, m)] for side in ("before", "after")) for m in known})
        for task, layer in order
    ]
    columns = [(metric, *COLUMNS[metric], metric in ALONE) for metric in known]
    in_total = set(changes.loc[changes["layer"] == "total", "metric"])
    return write_page(
        path,
        "change.html.j2",
        title=title,
        findings=findings,
        pictures=pictures,
        notices=notices,
        columns=columns,
        total_columns=[column for column in columns if column[0] in in_total],
        totals=[row for row in rows if row[1] == "total"],
        layers=[row for row in rows if row[1] != "total"],
        several=changes["task"].nunique() > 1,
        extra=extra or {},
    )
