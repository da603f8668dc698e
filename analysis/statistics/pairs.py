"""Relations of updates beyond chance, tested together so that false alarms stay rare."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special

from analysis.statistics.nulls import TWO_SIDED, alignment_p_value, holm

COLUMNS = ["metric", "task_a", "task_b", "value", "chance", "low", "high", "p_total", "layers", "below", "p"]


def relations(tested: pd.DataFrame, noise: pd.DataFrame | None = None, *, level: float = 0.95) -> pd.DataFrame:
    """One row per metric and pair of tasks of `against_chance`: is the pair related more than random updates are?

    With `noise`, the table of `noise_table`, there is one row per task more: ``spike``, with an empty ``task_a``, of
    the layer whose leading direction is furthest beyond random factors. Its ``p_total`` is NaN.

    `value` and `chance` are those of all layers together, `low` and `high` hold `level` of random updates (two-sided
    for alignment, from 0 for shares). `p_total` tests all layers together. `below` of `layers` have ``p_holm`` below
    0.05 on their own. `p` is adjusted for everything that the table tests: the smaller of ``p_total`` and the least
    ``p_holm``, doubled (for a spike the least ``p_holm`` alone), and then Holm's over all rows. For random updates the
    chance that any `p` of the table is below 0.05 is at most 5 %; measured: docs/analysis-report.md, "False alarms".

    >>> from analysis import AdapterSet, against_chance, interference_table
    >>> import torch
    >>> eye = torch.eye(50)
    >>> same = AdapterSet.from_factors({task: {"x": (eye[:, :2], eye[:, :2])} for task in "ab"})
    >>> table = relations(against_chance(interference_table(same)))
    >>> bool((table["p"] < 1e-3).all()), table["value"].round(3).tolist()
    (True, [1.0, 1.0, 1.0, 1.0])
    """
    rows: list[tuple[object, ...]] = []
    for (metric, a, b), group in tested.groupby(["metric", "task_a", "task_b"], sort=False):
        total, layers = group[group["layer"] == "total"], group[group["layer"] != "total"]
        if total.empty or not np.isfinite(total["p"].item()):
            continue
        one, least = total.iloc[0], float(layers["p_holm"].min())
        p = min(1.0, 2 * min(float(one["p"]), least if np.isfinite(least) else 1.0))
        low, high = chance_interval(str(metric), one["chance"], one["chance_std"], one["chance_shape"], level=level)
        numbers = (float(one["value"]), float(one["chance"]), low, high, float(one["p"]))
        rows.append((metric, a, b, *numbers, len(layers), int((layers["p_holm"] < 0.05).sum()), p))
    table = pd.DataFrame(rows + _spikes(noise), columns=COLUMNS)
    table["p"] = holm(table["p"])
    return table


def _spikes(noise: pd.DataFrame | None) -> list[tuple[object, ...]]:
    """One row per task that has a law: the layer with the least p."""
    if noise is None:
        return []
    rows: list[tuple[object, ...]] = []
    for task, layers in noise[noise["p"].notna()].groupby("task", sort=False):
        worst = layers.sort_values(["p", "spike"], ascending=[True, False]).iloc[0]
        numbers = (float(worst["spike"]), float(worst["chance"]), 1.0, float(worst["high"]), float("nan"))
        below = int((layers["p_holm"] < 0.05).sum())
        rows.append(("spike", "", str(task), *numbers, len(layers), below, float(worst["p_holm"])))
    return rows


def chance_interval(
    metric: str, chance: float, std: float, shape: float, *, level: float = 0.95
) -> tuple[float, float]:
    """The interval that holds a number of random updates with probability `level`: two-sided for alignment.

    A share has the interval from 0 to its quantile, since only more than chance is a relation.
    """
    if metric in TWO_SIDED:
        low, high = 0.0, 40.0
        for _ in range(40):  # p falls with the distance; 40 halvings reach 4e-11
            middle = (low + high) / 2
            low, high = (middle, high) if alignment_p_value(middle, shape) > 1 - level else (low, middle)
        distance = high * std
        return -distance, distance
    variance = std**2
    if not (variance > 0 and 0 < chance < 1):
        return 0.0, float(chance)
    strength = chance * (1 - chance) / variance - 1
    return 0.0, float(special.betaincinv(chance * strength, (1 - chance) * strength, level))


def strongest(table: pd.DataFrame, metrics: Sequence[str]) -> pd.Series | None:
    """The row of `relations` with the least p among some metrics, the largest value among equal ones; None without."""
    chosen = table[table["metric"].isin(list(metrics))]
    if chosen.empty:
        return None
    return chosen.assign(size=chosen["value"].abs()).sort_values(["p", "size"], ascending=[True, False]).iloc[0]
