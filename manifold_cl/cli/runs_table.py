"""Runs as a table on the terminal or in JSON, one row per run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import TYPE_CHECKING

from manifold_cl.cli.screen import print_table, screen

if TYPE_CHECKING:
    from manifold_cl.continual import RunRecord

FIGURES = ("zero_shot", "mft", "mfn", "maa", "bwt", "fwt")
CAPTION = (
    "MFT just learned · MFN at the end · MAA average on the way · BWT change of earlier tasks · FWT on tasks not yet "
    "learned · constraint: largest |xᵀx − I|, |Fᵀx|"
)
OPTIONAL: Mapping[str, str] = {
    "drift": "share of answers at the end that are no legal answer",
    "general_delta": "change on general sets from the pre-trained model to the end",
}
"""Figures of some records → their meaning."""
HEADINGS = {"drift": "drift", "general_delta": "general"}
"""Headings that are not the figure's name."""
COSTS = ("minutes", "peak MB", "constraint")
WIDE = 130
"""Columns of a table that goes into a file or pipe."""


def print_runs(records: Sequence[RunRecord], *, as_json: bool) -> None:
    """Print the figures of runs, one row per run."""
    if as_json:
        content = [
            {field: getattr(r, field) for field in ("name", "method", "stream", "status", "tasks")}
            | {"metrics": {name: None if isnan(value) else value for name, value in r.metrics.items()}}
            for r in records
        ]
        print(json.dumps(content, indent=1))
        return
    streams = {(r.stream, tuple(r.tasks)) for r in records}
    title = f"{records[0].stream}: accuracy in percent" if len(streams) == 1 else "accuracy in percent"
    if len(streams) > 1:
        screen.say(("these runs learned different streams: their figures do not compare", "yellow"))
    figures = (*FIGURES, *(name for name in OPTIONAL if any(_value(r, name) is not None for r in records)))
    headings = ("run", *(HEADINGS.get(name, name.upper().replace("_", "-")) for name in figures), *COSTS)
    caption = CAPTION + "".join(f" · {HEADINGS[name]}: {OPTIONAL[name]}" for name in figures if name in OPTIONAL)
    print_table(
        title, headings, [_row(r, figures) for r in records], caption, wide=WIDE + 12 * (len(figures) - len(FIGURES))
    )


def _row(record: RunRecord, figures: Sequence[str]) -> tuple[str, ...]:
    residuals = [residual for task in record.constraints for residual in task.values()]
    done = "" if record.status == "complete" else f" ({record.done} of {len(record.tasks)} tasks)"
    return (
        (record.name or "(no name)") + done,
        *(_figure(record, name) for name in figures),
        f"{record.seconds / 60:.1f}",
        f"{record.peak_memory_mb:.0f}" if record.peak_memory_mb is not None else "–",
        f"{_largest(residuals):.0e}" if residuals else "–",
    )


def _largest(residuals: Sequence[float]) -> float:
    """The largest one; NaN if one is."""
    return nan if any(map(isnan, residuals)) else max(residuals)


def _value(record: RunRecord, name: str) -> float | None:
    if name == "drift" and name in record.accuracy:
        return float(record.matrix(name)[record.done - 1].mean())
    return record.metrics.get(name)


def _figure(record: RunRecord, name: str) -> str:
    """The figure in percent. Joint training has seen every task at once, so it has no forward transfer."""
    value = _value(record, name)
    absent = record.method == "joint" and name.startswith("fwt")
    return "–" if absent or value is None or isnan(value) else f"{value:.1f}"
