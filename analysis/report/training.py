"""The page of a training, and the section of a report about it."""

from pathlib import Path
from typing import Any

import pandas as pd

import analysis.plots as plots
from analysis.report.page import number, p_value, write_page
from analysis.tables.titles import TITLES

RELOAD = 30
"""Seconds after which a live page reloads itself."""
INTERFERENCE = ("input_overlap", "backward", "leakage")
"""Measures that are tested against chance."""
SHOWN = ("effective_rank_energy", "top1_energy", "frobenius", "input_overlap", "alignment", "backward", "leakage")


def write_training_report(path: str | Path, log: pd.DataFrame, *, title: str = "Training", live: bool = False) -> Path:
    """The path of a page about the log of a training (`read_training_log`); a `live` one reloads itself."""
    section = training_section(log)
    return write_page(path, "training.html.j2", title=title, training=section, reload=RELOAD if live else None)


def training_section(log: pd.DataFrame) -> dict[str, Any]:
    """Figure, last numbers and findings of a log, for templates."""
    last = log[log["step"] == log["step"].max()]
    total = last[last["layer"] == "total"]
    shown = total[total["metric"].isin(SHOWN) | total["metric"].str.contains("/")]
    return {
        "figure": plots.training_panels(log),
        "alt": training_alt(total),
        "step": int(log["step"].max()),
        "measurements": int(log["step"].nunique()),
        "layers": int(last.loc[last["layer"] != "total", "layer"].nunique()),
        "rows": [{**row, "metric": _title(str(row["metric"]))} for row in shown.to_dict("records")],
        "alarms": alarms(total),
    }


def training_alt(total: pd.DataFrame) -> str:
    """The last numbers of the panels, in one sentence."""
    rows = total[total["metric"].isin(SHOWN)].to_dict("records")
    parts = [
        f"{_title(str(row['metric']))}{', ' + row['task'] if row['task'] else ''} {number(row['value'], '.3g')}"
        for row in rows
    ]
    return f"Measures of the adapters over the steps. At step {total['step'].max()}: {'; '.join(parts)}."


def _title(metric: str) -> str:
    """The words for a measure; further numbers keep their names."""
    return TITLES.get(metric, metric)


def alarms(total: pd.DataFrame) -> list[str]:
    """Sentences about interference with earlier tasks beyond chance, at 5 % over all earlier tasks and measures."""
    tested = total[total["metric"].isin(INTERFERENCE) & total["p"].notna()]
    found = tested[tested["p"] * len(tested) < 0.05]
    return [
        f"{_title(str(row['metric']))}, {row['task']}: {row['value']:.3f}, by chance {row['chance']:.3f} "
        f"(p {p_value(row['p'])})."
        for row in found.to_dict("records")
    ]
