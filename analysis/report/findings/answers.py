"""Findings about a model's answers on examples, and about its layers' inputs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

import analysis.plots as plots
from analysis.report.findings.finding import Finding, percent

CHANGED = 0.05
"""Share of changed answers from which the page calls for action where no loss is known. Our choice."""
SMALL_RISE = 0.05
"""Rise of the loss (nats) up to which the page says that nothing is to be done. Our choice."""


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
    sentence, size = f"On “{data}”, {share} of the answers differ between {since}", float(change["value"])
    known = "loss_change" in by
    metric = "loss_change" if known else "top1_change"
    if known:
        loss, before, after = (by[f"loss_{name}"] for name in ("change", "before", "after"))
        size, harmful, harmless = float(loss["value"]), bool(loss["ci_low"] > 0), bool(loss["ci_high"] <= SMALL_RISE)
        verb = "rises" if loss["value"] > 0 else "falls"
        sentence += f", and the loss {verb} from {before['value']:.2f} to {after['value']:.2f} nats"
    else:
        harmful, harmless = bool(change["ci_low"] > CHANGED), False
    number = f"{size:+.2f} nats of loss, {share} of answers".replace("-", "−") if known else f"{share} of answers"
    interval = f"loss {_interval(by['loss_change'], _nats)}; answers {shares}" if known else shares
    few = "" if count >= 3 else " With fewer than three examples there is no interval."
    return size, Finding(
        kind="answers",
        level="act" if harmful else "fine" if harmless else "note",
        headline=f"{sentence}.",
        number=number,
        interval=f"{interval} (95 %)" if not few else "none",
        certainty=f"Measured on {count} example{'s' if count > 1 else ''}, with updates added in the order of the "
        f"tasks. The interval is for other examples like these.{few}"
        + ("" if known else " Without labels a change may be good or bad."),
        action=_action(harmful=harmful, harmless=harmless, known=known),
        subject=label,
        draw=lambda: plots.plot_answer_changes(intervals, metric=metric),
        alt=f"{plots.ANSWERS[metric]} per data set and later task, with intervals: {sentence}.",
    )


def _action(*, harmful: bool, harmless: bool, known: bool) -> str:
    """What to do about a change of the answers."""
    if harmful:
        return (
            "Protect the inputs of this data, with `manifold-cl subspace build --model --data`, and train the later "
            "task again, or take its part on them off: `manifold-cl analyze mend --apply project --memory`. Then "
            "measure again."
        )
    if harmless:
        return "Nothing to do for examples like these; try others that matter to you."
    if known:
        return "Give more examples: the interval allows no rise of the loss, and one that matters."
    return "Give examples with answers (`prompt` and `completion`): they show whether the change is for the worse."


def _nats(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _interval(row: Mapping[str, float], form: Callable[[float], str]) -> str:
    return f"{form(row['ci_low'])} to {form(row['ci_high'])}" if row["ci_low"] == row["ci_low"] else "no interval"
