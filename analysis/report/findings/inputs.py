"""Findings about layers' outputs on examples: where an update acts on inputs that the data has."""

from collections.abc import Iterator, Sequence

import pandas as pd

import analysis.plots as plots
from analysis.report.findings.finding import Finding, percent

LARGE = 0.01
"""Share of the outputs' energy from which an update's effect on a layer is worth knowing. Our choice."""


def input_findings(label: str, drift: pd.DataFrame, tasks: Sequence[str]) -> Iterator[Finding]:
    """The largest effect of a later update on the layers' outputs, over data sets."""
    total = drift[drift["layer"] == "total"]
    place = {task: index for index, task in enumerate(tasks)}
    later = [place[task] > place.get(data, -1) for data, task in zip(total["data"], total["task"], strict=True)]
    total = total[later].dropna(subset="value").sort_values("value", ascending=False)
    if total.empty:
        return
    row = total.iloc[0]
    data, task = str(row["data"]), str(row["task"])
    layers = drift[(drift["data"] == data) & (drift["task"] == task) & (drift["layer"] != "total")]
    layers = layers.dropna(subset="value").sort_values("value", ascending=False)
    worst = layers.iloc[0]
    value, most = percent(row["value"]), f"{worst['layer']} ({percent(worst['value'])})"
    above = row["over_random"]
    random = f"{above:.1f} times what random directions of its size would" if above >= 0.05 else "far below random ones"
    yield Finding(
        kind="inputs",
        level="note" if row["value"] > LARGE else "fine",
        headline=f"On “{data}”, “{task}” changes the layers' outputs by {value} of their energy, {random}; "
        f"most in {most}.",
        number=f"{value} of ‖W x‖², all layers",
        interval=f"{percent(row['ci_low'])} to {percent(row['ci_high'])} (95 %)"
        if row["ci_low"] == row["ci_low"]
        else "none: fewer than three groups of examples",
        certainty=f"Measured in {len(layers)} layers of the base model. It says where an update acts. "
        "Whether that helps or harms is in the answers.",
        action="Protect the inputs of this data with `manifold-cl subspace build --model --data`, and take the "
        "update's part on them off: `manifold-cl analyze mend --apply project --memory`.",
        subject=label,
        draw=lambda: plots.plot_layer_drift(layers),
        alt=f"Relative drift of “{task}” on “{data}” per layer, the largest {min(8, len(layers))}: first {most}.",
    )
