"""Drift of layers' outputs on data: what an update adds to each layer, relative to what the layer computes."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.activations.moments import InputMoments
from analysis.adapters.adapter_set import AdapterSet

RESAMPLES = 1000
COLUMNS = ["data", "task", "layer", "value", "ci_low", "ci_high", "over_random"]


def input_drift(
    adapters: AdapterSet, moments: Mapping[str, InputMoments], *, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Tidy data, task, layer, value, ci_low, ci_high, over_random: the effect of updates on layers' outputs.

    `value` is ``Σ|ΔW x|² / Σ|W x|²`` over the tokens x of the data, in the base model: the relative functional drift of
    the layer. Its interval resamples groups of examples (percentiles), and is NaN with fewer than three groups.
    `over_random` is ``Σ|ΔW x|²`` over ``‖ΔW‖² Σ|x|² / n``, what an update of the same size in random directions would
    give: above 1, the update acts on inputs that this data has. The layer ``"total"`` adds numerators and
    denominators of all layers first.

    `moments` maps names of data to `input_moments` of the same adapters.
    """
    rows: list[tuple[str, str, str, float, float, float, float]] = []
    for name, measured in moments.items():
        groups = len(next(iter(measured.counts.values())))
        draws = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
        weights = np.concatenate([np.ones((1, groups)), draws])  # the data itself first
        for task in adapters.tasks:
            change, before, random = (np.empty((groups, len(measured.layers))) for _ in range(3))
            for index, (_, layer, left, right) in enumerate(adapters.read(task, measured.layers)):
                change[:, index] = measured.change(layer, task, left)
                before[:, index] = measured.outputs[layer]
                energy = ((left.double().mT @ left.double()) * (right.double().mT @ right.double())).sum().item()
                random[:, index] = energy / right.shape[0] * measured.energies[layer]
            names = [*measured.layers, "total"]
            sums = [weights @ np.column_stack([part, part.sum(1)]) for part in (change, before, random)]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio, against = sums[0] / sums[1], sums[0][0] / sums[2][0]
            tail = (1 - level) / 2
            low, high = (
                np.quantile(ratio[1:], [tail, 1 - tail], axis=0) if groups > 2 else np.full((2, len(names)), np.nan)
            )
            for index, layer in enumerate(names):
                numbers = (float(ratio[0, index]), float(low[index]), float(high[index]), float(against[index]))
                rows.append((name, task, layer, *numbers))
    return pd.DataFrame(rows, columns=COLUMNS)
