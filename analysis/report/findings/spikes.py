"""The finding about leading directions that hold more energy than in random factors."""

from collections.abc import Iterator

import pandas as pd

import analysis.plots as plots
from analysis.report.findings.finding import Finding, percent, probability
from analysis.tables.adapter_tables import AdapterTables

LEVEL = 0.05
HEAVY = 0.5
"""Share of an update's energy in one direction from which the page calls it heavy. Our choice."""


def spike_findings(label: str, tables: AdapterTables, relations: pd.DataFrame) -> Iterator[Finding]:
    """Whether a task's leading directions hold more energy than random factors give; the most extreme task."""
    rows = relations[relations["metric"] == "spike"].sort_values(["p", "value"], ascending=[True, False])
    if rows.empty:
        return
    row = rows.iloc[0]
    task, layers, below = str(row["task_b"]), int(row["layers"]), int(row["below"])
    noise = tables.noise
    of_task = noise[(noise["task"] == task) & noise["p"].notna()]
    worst = of_task.sort_values(["p", "spike"], ascending=[True, False]).iloc[0]
    layer = str(worst["layer"])
    # the spike is r p₁: divided by the rank it is the share of the energy
    share, chance, high = (float(worst[name]) / int(worst["rank"]) for name in ("spike", "chance", "high"))
    beyond = bool(row["p"] < LEVEL)
    heavy = beyond and share >= HEAVY
    number, limit = percent(share), percent(high)
    many = f"in {below} of {layers} layers" if layers > 1 else "in its layer"
    more = f"“{task}” has a leading direction beyond random factors {many}"
    none = f"No leading direction is beyond random factors; the largest is that of “{task}”"
    yield Finding(
        kind="spike",
        level="note" if beyond else "fine",
        headline=f"{more if beyond else none}: in {layer} it holds {number} of the energy, random factors up to "
        f"{limit}{'. A heavy spike: one direction does most of the work' if heavy else ''}.",
        number=f"{number} of the energy in σ₁ (chance {percent(chance)})",
        interval=f"random factors: up to {limit} (95 %)",
        certainty=f"{probability(row['p'])} after Holm's adjustment for all layers, tasks and relations. "
        + (
            "The direction carries something, which need not be useful."
            if beyond
            else "The spectrum alone does not tell the update from noise, which does not make it noise."
        ),
        action="`manifold-cl analyze mend --apply flatten` spreads the energy at the same norm; evaluate before and "
        "after (`--evaluate`)."
        if heavy
        else "Nothing to do.",
        subject=label,
        beyond_chance=beyond,
        draw=lambda: plots.plot_noise(noise),
        alt=f"σ₁² over the mean of σ² per layer; “{task}” in {layer}: {worst['spike']:.1f}, random factors up to "
        f"{worst['high']:.1f}. Beyond random factors {many}.".replace("in 0 of", "in none of"),
    )
