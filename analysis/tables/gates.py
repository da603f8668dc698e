"""Conditions on tables that make a command fail, such as ``entropy_min<0.5``."""

import difflib
import math
import operator
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import pandas as pd

from analysis.tables.spectrum_table import spectral_metrics

RELATIVE = ("norm_ratio", "spectral_norm_ratio", "intruder_dimensions")
"""Metrics that need the base model."""
METRICS = (
    *spectral_metrics(),
    *RELATIVE,
    *("alignment", "backward", "input_overlap", "output_overlap", "forward_subspace"),
    *("forward_corruption", "forward_corruption_energy", "forward_corruption_max"),
)
"""Metrics of the tables of spectra and interference."""
ALIASES = {
    "entropy": "entropy_energy_normalized",
    "effective_rank": "effective_rank_energy",
    "overlap": "input_overlap",
    "gini": "gini_energy",
    "flatness": "spectral_flatness_energy",
    "top1": "top1_energy",
}
AGGREGATES = ("min", "max", "mean", "median")
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_FORM = re.compile(rf"\s*(\w+?)_({'|'.join(AGGREGATES)})\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*$")


@dataclass(frozen=True)
class Gate:
    """A metric, the summary of its rows, and a bound. The gate fails if the condition holds.

    `value`, `unknown` and `fails` raise ValueError if no table has the metric.

    >>> str(Gate.parse("entropy_min<0.5"))
    'entropy_energy_normalized_min < 0.5'
    """

    metric: str
    aggregate: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """The gate written as ``metric_aggregate<number``; short names of metrics as in `ALIASES`.

        Raises:
            ValueError: the text has another form, or no table has the metric; the nearest names are in the message.
        """
        if match := _FORM.match(text):
            metric, aggregate, comparison, bound = match.groups()
            metric = ALIASES.get(metric, metric)
            if metric not in METRICS:
                near = difflib.get_close_matches(metric, [*ALIASES, *METRICS], n=2, cutoff=0.4)
                hint = f", did you mean {' or '.join(near)}?" if near else ""
                raise ValueError(f"unknown metric {metric!r} in {text!r}{hint} (have: {', '.join(sorted(METRICS))})")
            with suppress(ValueError):
                return cls(metric, aggregate, comparison, float(bound))
        raise ValueError(
            f"a gate is METRIC_{{{','.join(AGGREGATES)}}} < > <= >= NUMBER, such as 'entropy_min<0.5', got {text!r}"
        )

    def value(self, *tables: pd.DataFrame) -> float:
        """The summary over layers, of the tasks' own updates. NaN if any value is NaN."""
        return float(self._values(tables).agg(self.aggregate, skipna=False))

    def unknown(self, *tables: pd.DataFrame) -> list[str]:
        """The tasks and layers whose value is NaN, such as ``"news, h.0.q"``."""
        values = self._values(tables)
        return list(values[values.isna()].index)

    def _values(self, tables: Sequence[pd.DataFrame]) -> "pd.Series[float]":
        """The values to summarise, by run, task and layer."""
        named = [table for table in tables if "metric" in table and "step" not in table]  # no logs of trainings
        for table in named:
            rows = table[(table["metric"] == self.metric) & (table["layer"] != "total")]
            if "update" in table:
                rows = rows[rows["update"] == "task"]
            if rows["value"].notna().any():
                columns = [column for column in ("run", "task", "task_a", "task_b", "layer") if column in rows]
                names = rows[columns].astype(str).agg(", ".join, axis="columns")
                return rows["value"].set_axis(list(names)).astype(float)
        known = sorted({metric for table in named for metric in table["metric"]})
        raise ValueError(f"no table has the metric {self.metric!r} with a known value; there are {', '.join(known)}")

    def fails(self, *tables: pd.DataFrame) -> bool:
        """Whether the condition holds or the summary is unknown."""
        value = self.value(*tables)
        return math.isnan(value) or bool(COMPARISONS[self.comparison](value, self.bound))

    def __str__(self) -> str:
        """The condition with the metric's full name."""
        return f"{self.metric}_{self.aggregate} {self.comparison} {self.bound:g}"
