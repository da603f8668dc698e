"""Tables of a collection: members, pairs, outliers, layers, and curves of common directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from analysis.many.clusters import Tree, cluster_tree
from analysis.many.members import Omission
from analysis.many.workers import LayerResult, Measured, Pass
from analysis.numerics import spectral_measures as measures
from analysis.statistics import against_chance, holm, outlier_p_values

Array = NDArray[np.float64]
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Shares of the energy whose number of common directions is listed."""
POINTS = 80
"""Points of a curve."""
SPECTRUM: Mapping[str, Callable[[Array], Array]] = {
    "entropy_energy_normalized": partial(measures.spectral_entropy, normalized=True),
    "effective_rank_energy": measures.effective_rank,
    "stable_rank": measures.stable_rank,
    "top1_energy": partial(measures.top_energy, k=1),
}
TESTED = ("frobenius", "entropy_energy_normalized", "top1_energy", "overlap")
"""Columns of `members` that are tested for outliers; norms by their logarithms."""
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class CollectionTables:
    """Results of one pass over a collection. `members`, `pairs`, `outliers`, `layers` and `curves` are tidy tables."""

    side: str
    names: tuple[str, ...]
    left_out: tuple[Omission, ...]
    """Parts of the folder that are no member, members that could not be read to the end included."""
    notices: tuple[str, ...]
    overlap: Array
    """(members, members): mean squared cosine of principal angles over all layers; 1 on the diagonal."""
    chance: Array
    """(members, members): the same for random subspaces, and its standard deviation."""
    chance_std: Array
    tree: Tree
    spectra: pd.DataFrame
    """Per member: rank, norm, and means over layers of measures of the spectrum."""
    layers: pd.DataFrame
    """Per layer: mean overlap of all pairs, chance, and common directions per share of the energy."""
    curves: pd.DataFrame
    """Per layer and number of directions: share of all members' energy in the best common ones, and by chance."""

    @cached_property
    def members(self) -> pd.DataFrame:
        """One row per member: spectrum, mean overlap with the others, nearest member, cluster (0: none)."""
        others = self.overlap.copy()
        np.fill_diagonal(others, np.nan)
        nearest = np.nanargmax(others, axis=1)
        table = self.spectra.copy()
        table["overlap"] = np.nanmean(others, axis=1)
        table["nearest"] = [self.names[index] for index in nearest]
        table["nearest_overlap"] = others[np.arange(len(nearest)), nearest]
        table["cluster"] = self.tree.clusters
        return table

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per pair: member_a, member_b, overlap, chance, z, p and p_holm over all pairs."""
        a, b = np.triu_indices(len(self.names), 1)
        names = np.array(self.names, dtype=object)
        table = pd.DataFrame(
            {"task_a": names[a], "task_b": names[b], "layer": "total", "metric": f"{self.side}_overlap"}
        )
        table["value"], table["chance"] = self.overlap[a, b], self.chance[a, b]
        table["chance_std"], table["chance_shape"] = self.chance_std[a, b], np.nan
        table = against_chance(table)
        table["p_holm"] = holm(table["p"])
        table = table.rename(columns={"task_a": "member_a", "task_b": "member_b", "value": "overlap"})
        return table[["member_a", "member_b", "overlap", "chance", "chance_std", "z", "p", "p_holm"]]

    @cached_property
    def outliers(self) -> pd.DataFrame:
        """One row per member and tested column, smallest p first: value, median of all members, p, p_adjusted.

        `p` is that of `outlier_p_values` and corrected for the number of members; `p_adjusted` is also corrected for
        the number of columns.
        """
        rows: list[dict[str, Any]] = []
        for column in TESTED:
            values = self.members[column].to_numpy(dtype=float)
            with np.errstate(divide="ignore", invalid="ignore"):
                scaled = np.where(values > 0, np.log(values), np.nan) if column == "frobenius" else values
            middle = float(np.nanmedian(values)) if np.isfinite(values).any() else np.nan
            for name, value, p in zip(self.names, values, outlier_p_values(scaled), strict=True):
                adjusted = min(1.0, p * len(TESTED)) if np.isfinite(p) else np.nan
                row = {"member": name, "metric": column, "value": value, "median": middle}
                rows.append({**row, "p": p, "p_adjusted": adjusted})
        return pd.DataFrame(rows).sort_values("p", kind="stable").reset_index(drop=True)

    @property
    def found_outliers(self) -> pd.DataFrame:
        """The rows of `outliers` with `p_adjusted` below 0.05."""
        return self.outliers[self.outliers["p_adjusted"] < ALPHA]

    @property
    def related_pairs(self) -> int:
        """Pairs whose overlap is beyond chance, at 5 % over all pairs."""
        return int((self.pairs["p_holm"] < ALPHA).sum())


def collection_tables(
    work: Pass,
    measured: Measured,
    *,
    left_out: Sequence[Omission] = (),
    notices: Sequence[str] = (),
    clusters: int | None = None,
) -> CollectionTables:
    """The tables of measured layers; `left_out` and `notices` are those of the search for members."""
    names = tuple(member.name for member in measured.members)
    results = list(measured.layers.values())
    position = 1 if work.side == "input" else 0
    widths = {layer: shape[position] for layer, shape in work.shapes.items()}
    top, bottom, mean, variance = (np.zeros((len(names), len(names))) for _ in range(4))
    for result in results:
        parts = _layer_parts(result, widths[result.layer])
        for total, part in zip((top, bottom, mean, variance), parts, strict=True):
            total += part
    safe = np.where(bottom > 0, bottom, np.nan)
    overlap, chance, spread = top / safe, mean / safe, np.sqrt(variance) / safe
    known = np.nan_to_num(overlap, nan=0.0)
    np.fill_diagonal(known, 1.0)
    if clusters is not None:
        clusters = min(clusters, len(names))
    tree = cluster_tree(known, _highest_chance(chance, spread), clusters=clusters)
    curves, reached = _curves(results, widths)
    return CollectionTables(
        side=work.side,
        names=names,
        left_out=(*left_out, *measured.failed),
        notices=tuple(notices),
        overlap=known,
        chance=chance,
        chance_std=spread,
        tree=tree,
        spectra=_spectra(names, results),
        layers=_layer_table(results, widths).merge(reached, on="layer", how="left"),
        curves=curves,
    )


def _layer_parts(result: LayerResult, width: int) -> tuple[Array, Array, Array, Array]:
    """Per pair of members: ``‖V_aᵀ V_b‖²``, the smaller rank, and mean and variance of the first by chance."""
    rank = result.ranks.numpy()
    a, b = rank[:, None], rank[None, :]
    mean = a * b / width
    variance = 2 * a * b * (width - a) * (width - b) / (width**2 * max(width - 1, 1) * (width + 2))
    return result.top.double().numpy(), np.minimum(a, b), mean, variance


def _highest_chance(chance: Array, spread: Array) -> float:
    """The overlap that all pairs of random members stay below with 95 % probability, after Bonferroni."""
    upper = np.triu_indices(len(chance), 1)
    laws = np.unique(np.stack([chance[upper], spread[upper]], axis=1).round(12), axis=0)
    laws = laws[np.isfinite(laws).all(1) & (laws[:, 1] > 0) & (laws[:, 0] < 1)]
    if not len(laws):
        return 1.0
    mean, variance = laws[:, 0], laws[:, 1] ** 2
    strength = mean * (1 - mean) / variance - 1
    quantiles = 1 - special.betaincinv((1 - mean) * strength, mean * strength, ALPHA / len(upper[0]))
    return float(np.max(quantiles))


def _spectra(names: tuple[str, ...], results: list[LayerResult]) -> pd.DataFrame:
    """Per member: largest rank, norm over all layers, means over layers of `SPECTRUM`, and layers that are zero."""
    energy = np.zeros(len(names))
    sums = {metric: np.zeros(len(names)) for metric in SPECTRUM}
    counts = {metric: np.zeros(len(names)) for metric in SPECTRUM}
    ranks, zeros = np.zeros(len(names), dtype=int), np.zeros(len(names), dtype=int)
    for result in results:
        lengths = result.widths.numpy()
        values = np.split(result.values.numpy(), np.cumsum(lengths)[:-1])
        ranks = np.maximum(ranks, lengths)
        for length in np.unique(lengths):
            index = np.flatnonzero(lengths == length)
            sigma = np.stack([values[member] for member in index])
            energy[index] += (sigma**2).sum(1)
            there = sigma.max(1) > 0
            zeros[index[~there]] += 1
            if not there.any():
                continue
            for metric, measure in SPECTRUM.items():
                numbers = measure(sigma[there])
                finite = np.isfinite(numbers)
                sums[metric][index[there][finite]] += numbers[finite]
                counts[metric][index[there][finite]] += 1
    table = pd.DataFrame({"member": names, "rank": ranks, "frobenius": np.sqrt(energy)})
    for metric in SPECTRUM:
        table[metric] = sums[metric] / np.where(counts[metric] > 0, counts[metric], np.nan)
    return table.assign(zero_layers=zeros)


def _layer_table(results: list[LayerResult], widths: dict[str, int]) -> pd.DataFrame:
    """Per layer: directions n, sum of ranks, mean overlap over pairs, and chance."""
    rows = []
    for result in results:
        top, bottom, mean, _ = (np.triu(part, 1).sum() for part in _layer_parts(result, widths[result.layer]))
        known = bottom if bottom > 0 else np.nan
        row = {"layer": result.layer, "width": widths[result.layer], "directions": int(result.ranks.sum())}
        rows.append({**row, "overlap": top / known, "chance": mean / known})
    return pd.DataFrame(rows)


def _curves(results: list[LayerResult], widths: dict[str, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Points of every curve, and per layer the directions that reach each of `LEVELS`."""
    drawn = {widths[r.layer]: r.curve.random.numpy() for r in results if r.curve and r.curve.random is not None}
    points, reached = [], []
    for result in results:
        if result.curve is None:
            continue
        share, random = result.curve.share.numpy(), drawn[widths[result.layer]]
        at = np.unique(np.geomspace(1, len(share), POINTS).round().astype(int))
        by_chance = random[np.minimum(at, len(random)) - 1]
        values = {"directions": at, "share": share[at - 1], "random_share": by_chance}
        points.append(pd.DataFrame({"layer": result.layer, "width": widths[result.layer], **values}))
        needed = {f"directions_{level:g}": _needed(share, level) for level in LEVELS}
        by_chance_needed = {f"random_{level:g}": _needed(random, level) for level in LEVELS}
        reached.append({"layer": result.layer, **needed, **by_chance_needed})
    columns = [f"{kind}_{level:g}" for kind in ("directions", "random") for level in LEVELS]
    empty = pd.DataFrame(columns=["layer", "width", "directions", "share", "random_share"])
    table = pd.concat(points, ignore_index=True) if points else empty
    return table, pd.DataFrame(reached, columns=["layer", *columns])


def _needed(share: Array, level: float) -> int:
    """The number of directions that hold a share of the energy."""
    return min(int(np.searchsorted(share, level - 1e-6)) + 1, len(share))
