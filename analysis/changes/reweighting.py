"""Singular values that grow or shrink by their effect on a loss, where this effect is more than chance."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.interventions import changed_set
from analysis.numerics.decomposition import triples
from analysis.statistics.nulls import holm

Effects = Mapping[str, Mapping[str, Tensor]]
"""Task to layer to (examples, r), from `analysis.activations.component_effects`."""


def effect_table(effects: Effects, *, level: float = 0.95) -> pd.DataFrame:
    """Tidy task, layer, component, effect, ci_low, ci_high, p, p_holm of each component's effect on the loss.

    `effect` is the mean over examples of ``σ_i ∂L/∂σ_i``, with Student's interval: positive where the loss would fall
    if the component shrank. `p` is two-sided, against no effect; `p_holm` is adjusted for all components of all layers.

    Raises:
        ValueError: fewer than 3 examples.
    """
    frames = []
    for task, layers in effects.items():
        for layer, values in layers.items():
            n = len(values)
            if n < 3:
                raise ValueError(f"{n} examples are too few to tell effects from chance: give at least 3")
            mean, error = values.mean(0).numpy(), (values.std(0) / n**0.5).numpy()
            with np.errstate(divide="ignore", invalid="ignore"):  # a component without any effect
                p = np.where(error > 0, 2 * stats.t.sf(np.abs(mean / error), n - 1), 1.0)
            width = stats.t.ppf((1 + level) / 2, n - 1) * error
            columns = {"effect": mean, "ci_low": mean - width, "ci_high": mean + width, "p": p}
            index = np.arange(1, len(mean) + 1)
            frames.append(pd.DataFrame({"task": task, "layer": layer, "component": index, **columns}))
    table = pd.concat(frames, ignore_index=True)
    return table.assign(p_holm=holm(table["p"].to_numpy()))


def reweighted(adapters: AdapterSet, table: pd.DataFrame, gamma: float = 0.5, *, alpha: float = 0.05) -> AdapterSet:
    """Updates whose components shrink by the factor ``1 − γ`` or grow by ``1 + γ``, and then have the old norm.

    Those shrink whose `effect` in `effect_table` is positive and those grow whose effect is negative, where `p_holm`
    is below `alpha`; the others keep their size relative to each other. The rule is ours. A layer without such a
    component stays as it is.

    Raises:
        ValueError: gamma is outside [0, 1).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma is {gamma}, a number from 0 and below 1 was expected")
    marked = table[table["p_holm"] < alpha]
    groups = dict(iter(marked.groupby(["task", "layer"])))

    def change(task: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if (task, layer) not in groups:
            return left, right
        update = triples(left[None], right[None])
        sigma, rows = update.values[0], groups[task, layer]
        factors = torch.ones_like(sigma)
        signs = torch.tensor(np.sign(rows["effect"].to_numpy(dtype=float)), dtype=sigma.dtype)
        factors[torch.tensor(rows["component"].to_numpy(dtype=int) - 1)] = 1.0 - gamma * signs
        new = sigma * factors
        new = new * (update.energy[0].sqrt() / torch.linalg.vector_norm(new))
        return update.left[0] * new, update.right[0]

    return changed_set(adapters, change)
