"""Table of a study on the terminal, in Markdown or JSON: one row per method, means over seeds and orders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import isnan, nan
from typing import TYPE_CHECKING, Any, cast

from manifold_cl.cli.screen import print_table, visible

if TYPE_CHECKING:
    import pandas as pd

    from manifold_cl.cli.analysis_package import analysis

SHOWN = ("mft", "mfn", "bwt", "fwt")
COSTS = (("peak_memory_mb", "peak MB", 0), ("state_mb", "kept MB", 1))
HEADINGS = (
    "method",
    "n",
    *(name.upper() for name in SHOWN),
    "Δ MFN",
    "p",
    "minutes",
    *(heading for _, heading, _ in COSTS),
    "old data",
)
WIDE = 150
"""Columns of a table in a file or pipe."""
KEY = (
    "n cells · MFT just learned · MFN at the end · BWT change of earlier tasks · FWT on tasks not yet learned · Δ MFN "
    "against {reference}, paired, and its p adjusted after Holm over the methods that compete · minutes: the fastest "
    "cell · kept: what a method carries from task to task"
)


def print_study(study: analysis.StudyResults, *, as_json: bool) -> None:
    """Print the means of a study over its seeds and orders, one row per method."""
    if as_json:
        content = {"summary": _rows_of(study.summary()), "paired": []}
        if study.reference in study.labels:
            content["paired"] = _rows_of(study.paired())
        print(json.dumps(content, indent=1))
        return
    title = f"{study.name}: mean in percent ± half the 95 % interval over seeds and orders"
    print_table(title, HEADINGS, list(_rows(study)), KEY.format(reference=study.reference), wide=WIDE)


def _rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, with null for NaN."""
    return cast(list[dict[str, Any]], json.loads(table.to_json(orient="records")))


def markdown_of(study: analysis.StudyResults) -> str:
    """The same table in Markdown."""
    ruler = ("---", *("--:" for _ in HEADINGS[1:]))
    # In a label a bar would end the cell, a backtick the quotation.
    rows = [("`" + visible(label).replace("|", r"\|").replace("`", "'") + "`", *rest) for label, *rest in _rows(study)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADINGS, ruler, *rows))


def _rows(study: analysis.StudyResults) -> Iterator[tuple[str, ...]]:
    """One row per method, in the order of the study."""
    summary, fastest = study.summary(), study.fastest()
    has_reference = study.reference in study.labels
    paired = study.paired(figures=["mfn"]) if has_reference else summary.head(0)
    for label in study.labels:
        values = summary[summary["label"] == label].set_index("figure")
        against = paired[paired["label"] == label]
        yield (
            label,
            str(int(values["n"].max())),
            *(_with_interval(values, figure) for figure in SHOWN),
            *(("–", "–") if against.empty else _difference(against.iloc[0])),
            _number(fastest[label], 1),
            *(_number(values["mean"].get(figure, nan), digits) for figure, _, digits in COSTS),
            {True: "yes", False: "no", None: "–"}[study.keeps_old_data(label)],
        )


def _with_interval(values: pd.DataFrame, figure: str) -> str:
    if figure not in values.index or values["n"][figure] == 0:
        return "–"
    half = (values["high"][figure] - values["low"][figure]) / 2
    return f"{values['mean'][figure]:.1f}" + ("" if isnan(half) else f" ±{half:.1f}")


def _difference(row: pd.Series[Any]) -> tuple[str, str]:
    """Δ MFN and p; dashes if the methods have no cell in common."""
    difference, p = row["difference"], row["p_holm"]
    return "–" if isnan(difference) else f"{difference:+.1f}", "–" if isnan(p) else f"{p:.3f}"


def _number(value: float, digits: int) -> str:
    return "–" if isnan(value) else f"{value:.{digits}f}"
