"""Parts of layers in forgetting, and the measures of their updates that go with it: association only."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.causes.result_files import replicate, result_files
from analysis.numerics.spectral_measures import spectral_entropy
from analysis.statistics import holm
from analysis.statistics.partial import partial_ranks
from analysis.studies import mean_interval

FORMAT = "manifold_cl.layer_forgetting"
MEASURES = ("imbalance", "norm", "overlap", "drift")


def layer_table(paths: Iterable[str | Path]) -> pd.DataFrame:
    """One row per run, task, earlier task and layer, from the files of ``measure_layers`` of manifold_cl.

    Columns: run, method, replicate, task, old, layer, effect (the layer's part of the change of the earlier task's
    loss, in nats, positive is forgetting), change (that of all layers, as measured), imbalance (1 − normalised
    entropy), norm (Frobenius), overlap (share of the earlier task's input energy, weighted by squared loss gradients,
    that lies in the update's input directions) and drift (energy of ΔW x over that of W x on its inputs). Rows with
    ``old`` equal to ``task`` are learning.

    Raises:
        ValueError: a file is damaged or of another format.
    """
    rows = []
    for run, content in result_files(paths, FORMAT, "pairs"):
        for task, pairs in content["pairs"].items():
            spectra = {layer: np.asarray(values) for layer, values in content["spectra"][task].items()}
            shape = {
                layer: (1.0 - float(spectral_entropy(sigma, normalized=True)), float(np.linalg.norm(sigma)))
                for layer, sigma in spectra.items()
            }
            for old, pair in pairs.items():
                keys = (run, content["method"], replicate(content), task, old)
                change = pair["after"] - pair["before"]
                rows += [
                    (*keys, layer, row["effect"], change, *shape[layer], row["overlap"], row["drift"])
                    for layer, row in pair["layers"].items()
                ]
    columns = ["run", "method", "replicate", "task", "old", "layer", "effect", "change", *MEASURES]
    return pd.DataFrame(rows, columns=columns)


def mediation_table(
    table: pd.DataFrame, *, measures: Sequence[str] = MEASURES, level: float = 0.95, samples: int = 2000
) -> pd.DataFrame:
    """One row per method and measure: its partial rank correlation with forgetting when the other measures are held.

    Columns method, measure, n, value, low, high, p, p_holm. The correlation is over the layers of each pair of a task
    and an earlier one, less the mean of each layer: does a layer forget more than it usually does where this measure is
    higher than it usually is? Each run gives one number; `value` is their mean with Student's interval over the n runs
    in which the measure varies. p is the largest of their permutation tests, adjusted by Holm over the measures of one
    method: every single run must show it. The null permutes layers, in all pairs of a run alike, since pairs of one
    task have one update. It takes the layers of a model as independent of each other.

    Raises:
        ValueError: level is not between 0 and 1.
    """
    forgetting = table[table["task"] != table["old"]]
    rows = []
    for method, group in forgetting.groupby("method", sort=False):
        found: dict[str, list[tuple[float, float]]] = {measure: [] for measure in measures}
        for _, run in group.groupby("run", sort=False):
            pairs = run["task"] + " " + run["old"]
            values = {measure: _rounded(run[measure]) for measure in measures}
            tests = partial_ranks(run["effect"], values, pairs, units=run["layer"], samples=samples)
            for measure, test in tests.items():
                found[measure].append((test.value, test.p))
        worst = [max((p for _, p in found[measure] if not np.isnan(p)), default=np.nan) for measure in measures]
        for measure, p, p_holm in zip(measures, worst, holm(worst).tolist(), strict=True):
            n, mean, _, low, high = mean_interval([value for value, _ in found[measure]], level=level)
            rows.append((method, measure, n, mean, low, high, p, p_holm))
    return pd.DataFrame(rows, columns=["method", "measure", "n", "value", "low", "high", "p", "p_holm"])


def _rounded(measure: pd.Series) -> NDArray[np.float64]:
    """Values to six digits, and below 1e-12 zero: float32 rounding is no variation."""
    values = measure.to_numpy(dtype=np.float64)
    values = np.where(np.abs(values) > 1e-12, values, 0.0)
    units = 10.0 ** (np.floor(np.log10(np.abs(values), out=np.zeros_like(values), where=values != 0)) - 5)
    return np.asarray(np.round(values / units) * units)
