"""Findings about a model's answers on examples, and about its layers' inputs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

import analysis.plots as plots
from analysis.report.findings.finding import Finding, percent

CHANGED = 0.05
"""Share of changed answers from which the page calls for action where no loss is known. Our choice."""


def answer_findings(label: str, intervals: pd.DataFrame) -> Iterator[Finding]:
    """What later tasks did to the answers on each data set, by the end; the worst data set first."""
    later = intervals[intervals["data"] != intervals["task_b"]]
    if later.empty:
        return
    ends = later.groupby("data", sort=False)["task_b"].last()
    final = later[later["task_b"] == later["data"].map(ends)]
    findings = [_finding(label, str(data), rows, intervals) for data, rows in final.groupby("data", sort=False)]
    yield from (finding for _, finding in sorted(findings, key=lambda pair: -pair[0]))


def _finding(label: str, data: str, rows: pd.DataFrame, intervals: pd.DataFrame) -> tuple[float, Finding]:
    """Size of the change, and its finding."""
    by: dict[str, Any] = {str(row["metric"]): row for row in rows.to_dict("records")}
    change = by["top1_change"]
    count = int(change["examples"])
    a, b = str(rows["task_a"].iloc[0]), str(rows["task_b"].iloc[0])
    since = f"the model after “{a}” and after “{b}”" if a else f"the base model and the model after “{b}”"
    share, shares = percent(change["value"]), _interval(change, percent)
    sentence, size, harmful = (
        f"On “{data}”, {share} of the answers differ between {since}",
        float(change["value"]),
        False,
    )
    known = "loss_change" in by
    metric = "loss_change" if known else "top1_change"
    if known:
        loss, before, after = (by[f"loss_{name}"] for name in ("change", "before", "after"))
        size, harmful = float(loss["value"]), bool(loss["ci_low"] > 0)
        verb = "rises" if loss["value"] > 0 else "falls"
        sentence += f", and the loss {verb} from {before['value']:.2f} to {after['value']:.2f} nats"
    else:
        harmful = bool(change["ci_low"] > CHANGED)
    number = f"{size:+.2f} nats of loss, {share} of answers".replace("-", "−") if known else f"{share} of answers"
    interval = f"loss {_interval(by['loss_change'], _nats)}; answers {shares}" if known else shares
    few = "" if count >= 3 else " With fewer than three examples there is no interval."
    return size, Finding(
        kind="answers",
        level="act" if harmful else "fine" if known else "note",
        headline=f"{sentence}.",
        number=number,
        interval=f"{interval} (95 %)" if not few else "none",
        certainty=f"Measured on {count} examples; the interval is for other examples like these.{few}"
        + ("" if known else " Without labels a change may be good or bad."),
        action=(
            "Train the later task with protection, or project its update off what the earlier one uses: "
            "`manifold-cl analyze mend`; measure again with the same `--data`."
            if harmful
            else "Nothing to do for examples like these; try others that matter to you."
        ),
        subject=label,
        draw=lambda: plots.plot_answer_changes(intervals, metric=metric),
        alt=f"{plots.ANSWERS[metric]} per data set and later task, with intervals: {sentence}.",
    )


def _nats(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _interval(row: Mapping[str, float], form: Callable[[float], str]) -> str:
    return f"{form(row['ci_low'])} to {form(row['ci_high'])}" if row["ci_low"] == row["ci_low"] else "no interval"
