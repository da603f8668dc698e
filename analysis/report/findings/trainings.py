"""The finding about the log of a training: interference with earlier tasks at its last measurement."""

from typing import Any

import pandas as pd

import analysis.plots as plots
from analysis.report.findings.finding import Finding
from analysis.report.training import INTERFERENCE, alarms, training_alt
from analysis.tables.titles import TITLES


def training_finding(label: str, name: str, log: pd.DataFrame) -> Finding:
    """Whether the update that was trained interferes with earlier tasks beyond chance, at the last step."""
    step = int(log["step"].max())
    total = log[(log["step"] == step) & (log["layer"] == "total")]
    tested = total[total["metric"].isin(INTERFERENCE) & total["p"].notna()]
    found = alarms(total)
    shared: dict[str, Any] = {"kind": "training", "subject": label, "alt": training_alt(total)}
    at = f"“{name}”, step {step}"
    if tested.empty:
        energy = total[total["metric"] == "effective_rank_energy"]["value"]
        rank = f"effective rank {energy.iloc[0]:.1f}" if len(energy) else "the update is zero"
        return Finding(
            level="note",
            headline=f"{at}: {rank}; no earlier task was given, so interference was not measured.",
            number=rank,
            interval="none: one training",
            certainty="Exact for these weights, mean over layers.",
            action="Give earlier tasks to the watch: `TrainingWatch(folder, earlier=[...])`.",
            draw=lambda: plots.plot_training(log, metric="effective_rank_energy" if len(energy) else "frobenius"),
            **shared,
        )
    row = tested.sort_values("p").iloc[0]
    metric = str(row["metric"])
    words = f"{TITLES[metric]}, “{row['task']}”: {row['value']:.3f}, chance {row['chance']:.3f}"
    return Finding(
        level="note" if found else "fine",
        headline=f"{at}: {'more' if found else 'no more'} interference with earlier tasks than chance; {words}.",
        number=f"{row['value']:.3f} (chance {row['chance']:.3f})",
        interval="none: exact for these weights",
        certainty=f"{len(found)} of {len(tested)} numbers are beyond chance at 5 %, after Bonferroni over this "
        "measurement. Weights alone do not show forgetting.",
        action="Evaluate the earlier tasks now, or protect their inputs: `manifold-cl subspace build`."
        if found
        else "Evaluate the earlier tasks when the training ends.",
        beyond_chance=bool(found),
        draw=lambda: plots.plot_training(log, metric=metric),
        **shared,
    )
