"""One measurement of a model's adapters: spectra, and interference with earlier tasks and protected directions."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.agreement import matched_layers, shared_layers
from analysis.adapters.batches import LayerBatch, protected_bases, protected_energies
from analysis.formats import Source, held_adapter
from analysis.numerics import spectral_measures as measures
from analysis.numerics.decomposition import decompose
from analysis.statistics import against_chance
from analysis.tables.interference import Row, interference_frame, interference_rows
from analysis.tables.training_log import COLUMNS

SPECTRA = ("entropy_energy_normalized", "effective_rank_energy", "stable_rank", "top1_energy", "frobenius")
INTERFERENCE = ("input_overlap", "output_overlap", "alignment", "backward", "leakage")
Factors = Mapping[str, tuple[Tensor, Tensor]]


def held(adapters: AdapterSet) -> AdapterSet:
    """The set with its factors in memory, for measurements that repeat."""
    sources = []
    for task in adapters.tasks:
        factors = {layer: (left, right) for _, layer, left, right in adapters.read(task, adapters.layers)}
        sources.append(held_adapter(task, factors))
    return AdapterSet(tuple(sources), (None,) * len(sources))


def measure_factors(
    factors: Factors,
    *,
    task: str,
    earlier: AdapterSet | None = None,
    protected: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """The rows of one measurement, without the column `step`. O((m + n) R²) per layer, R the sum of all ranks.

    The layer ``"total"`` holds means over layers for spectra, the norm of all layers together for ``frobenius``, and
    sums of numerators and denominators for interference. Zero updates have no spectrum and no rows but their norm.
    Interference is measured on the layers that all tasks have.
    """
    live: Source = held_adapter(task, dict(factors))
    values: dict[str, np.ndarray] = {}
    rows: list[Row] = []
    everything = _together(live, earlier)
    basis_of = protected_bases(everything, protected) if protected is not None else (lambda task, layer: None)
    for layer in live.shapes:
        common = everything.layers if layer in everything.sources[0].shapes else ()
        members = everything if common else AdapterSet((live,), (None,))
        batch = _batch(members, layer, device)
        values[layer] = batch.updates[-1].values[0].cpu().double().numpy()
        if common and values[layer].max() > 0:
            last = [energy for energy in protected_energies(batch, basis_of) if batch.tasks[energy.task] == task]
            rows += [row for row in interference_rows(batch, last) if row[1] == task]
    return pd.concat([_spectra(values), _interference(everything, rows)], ignore_index=True)[list(COLUMNS[1:])]


def _together(live: Source, earlier: AdapterSet | None) -> AdapterSet:
    """The earlier tasks and the live one, on the layers that all have, with the names of the live one."""
    sources: list[Source] = [live]
    for source in earlier.sources if earlier is not None else ():
        names = matched_layers(live, source)
        sources.append(source.relabelled(names, "layers have other names than in the model") if names else source)
    shared = shared_layers(sources) if len(sources) > 1 else sources
    return AdapterSet((*shared[1:], shared[0]), (None,) * len(shared))


def _batch(adapters: AdapterSet, layer: str, device: torch.device | str) -> LayerBatch:
    """One layer of all tasks, decomposed."""
    pairs = [adapters.factors(task, layer) for task in adapters.tasks]
    lefts, rights = (torch.cat(parts, dim=1)[None].to(device, torch.float64) for parts in zip(*pairs, strict=True))
    ranks = [left.shape[1] for left, _ in pairs]
    (m, n), tasks = (lefts.shape[1], rights.shape[1]), adapters.tasks
    return LayerBatch(tasks, (layer,), m, n, decompose(lefts, rights, ranks), rights)


def _spectra(values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    rows: list[tuple[str, str, float]] = []
    for layer, sigma in values.items():
        rows.append(("frobenius", layer, float(np.linalg.norm(sigma))))
        if sigma.max() > 0:
            rows += [
                ("entropy_energy_normalized", layer, float(measures.spectral_entropy(sigma, normalized=True))),
                ("effective_rank_energy", layer, float(measures.effective_rank(sigma))),
                ("stable_rank", layer, float(measures.stable_rank(sigma))),
                ("top1_energy", layer, float(measures.top_energy(sigma, 1))),
            ]
    table = pd.DataFrame(rows, columns=["metric", "layer", "value"]).dropna()
    totals = table.groupby("metric", sort=False)["value"].mean()
    totals["frobenius"] = float(np.sqrt(table.loc[table["metric"] == "frobenius", "value"].pow(2).sum()))
    total = totals.rename_axis("metric").reset_index(name="value").assign(layer="total")
    return pd.concat([table, total], ignore_index=True).assign(task="", chance=np.nan, p=np.nan)


def _interference(adapters: AdapterSet, rows: list[Row]) -> pd.DataFrame:
    table = against_chance(interference_frame(adapters, rows))
    table = table[table["metric"].isin(INTERFERENCE)]
    return table.rename(columns={"task_a": "task"})[["metric", "task", "layer", "value", "chance", "p"]]
