"""The interference of updates of different tasks: overlap, alignment, leakage, corruption."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import (
    MEMORY_BUDGET,
    LayerBatch,
    Progress,
    ProtectedEnergy,
    layer_batches,
    protected_bases,
    protected_energies,
)
from analysis.formats import Checkpoint
from analysis.numerics.decomposition import Triples
from analysis.tables.activations import Covariances, activation_rows
from analysis.tables.frames import in_order

Row = tuple[str | float, ...]
"""Task a, task b, metric, layer, and the numbers of a `Part`."""
PROTECTED = "protected"
"""The name in task_a of the subspace that was protected before task_b."""
COLUMNS = ["task_a", "task_b", "layer", "metric", "value", "chance", "chance_std", "chance_shape"]
SQUARED = ("forward_subspace",)
"""Metrics whose parts are energies and whose value is the square root."""
HIGHEST = ("forward_corruption_max",)
"""Metrics whose total is the largest layer's, not a ratio of sums."""


class Part(NamedTuple):
    """One number per layer as ``top / √(a b)``, so that sums over layers give the total by the same rule."""

    metric: str
    top: Tensor
    a: Tensor
    b: Tensor
    random: Tensor
    """Numerator expected for directions drawn at random."""
    variance: Tensor
    """Variance of that numerator; NaN where no closed form is used."""
    fourth: Tensor
    """Its excess kurtosis times the squared variance; NaN for quantities that are bounded below by zero."""


def interference_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float64,
    memory_budget: int = MEMORY_BUDGET,
    protected: Mapping[str, Tensor] | None = None,
    covariances: Covariances | None = None,
    base: Checkpoint | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy interference of every pair of tasks: task_a, task_b, layer, metric, value, chance, chance_std, chance_shape.

    `task_a` comes before `task_b` in the order of learning, so each pair occurs once. Metrics, their formulas and null
    laws, numerical ranks and the layer ``"total"``: docs/analysis.md, "Interference". Rows of ``leakage`` have
    ``task_a = "protected"``, and exist where a run folder holds the subspace or `protected` gives one. Metrics of
    activations need `covariances`, and ``activation_drift_relative`` also `base`.

    `chance` is the mean (for ``forward_subspace`` the root mean square) for frames drawn uniformly at random with these
    spectra, `chance_std` its standard deviation, and `chance_shape` the shape of the cosine's law, where closed forms
    exist (`against_chance` makes z-scores and p-values of them). A metric of a zero update is NaN.

    Cost: O((m + n) R²) per layer for R the sum of all ranks; ΔW is never formed.

    Args:
        adapters: the updates, tasks in order.
        device: where it is computed.
        dtype: precision.
        memory_budget: bytes; the memory needed does not grow with the number of layers.
        protected: layer name to orthonormal basis (n, k), used for every task instead of what a run holds.
        covariances: task to layer to C (n, n), or a root (n, k) of it, ``C = root rootᵀ``.
        base: the model that was adapted.
        progress: called with the number of finished layers and of all layers.

    Raises:
        ValueError: a basis or a covariance does not fit its layer, or no protected layer is an adapted one.

    >>> eye = torch.eye(4)
    >>> a = (eye[:, :2] * torch.tensor([4.0, 1.0]), eye[:, :2])  # σ = 4 and 1
    >>> b = (-3 * eye[:, :1], eye[:, :1])  # takes 3 off the first
    >>> two = AdapterSet.from_factors({"a": {"x": a}, "b": {"x": b}})
    >>> moment = {"a": {"x": torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))}}
    >>> table = interference_table(two, protected={"x": eye[:, :1]}, covariances=moment)
    >>> for row in table[table["layer"] == "x"].itertuples():
    ...     print(f"{row.task_a:9} {row.task_b} {row.metric:25} {row.value:.4f}")
    a         b input_overlap             1.0000
    a         b output_overlap            1.0000
    a         b alignment                 -0.9701
    a         b backward                  1.0000
    a         b forward_subspace          0.7276
    a         b forward_corruption        0.3750
    a         b forward_corruption_energy 0.7059
    a         b forward_corruption_max    0.7500
    protected a leakage                   0.9412
    protected b leakage                   1.0000
    a         b activation_drift          1.6000
    a         b activation_alignment      -0.9847

    By hand: −12 / (3√17), 1, 3 / √17, (3/4 + 0) / 2, 16 · (3/4) / 17, 3/4, 16/17, 1, 18 / (9 · 5/4), −24 / √(33 · 18).
    """
    basis_of = protected_bases(adapters, protected)
    rows: list[Row] = []
    for batch in layer_batches(adapters, device=device, dtype=dtype, memory_budget=memory_budget, progress=progress):
        rows += interference_rows(batch, protected_energies(batch, basis_of))
        if covariances is not None:
            rows += activation_rows(adapters, batch, covariances, base)
    return interference_frame(adapters, rows)


def interference_rows(batch: LayerBatch, energies: Sequence[ProtectedEnergy]) -> list[Row]:
    """The parts of every metric of one batch."""
    rows: list[Row] = []
    for first, second, outputs, inputs in batch.decomposition.pairs():
        a, b = batch.updates[first], batch.updates[second]
        for part in _pair(a, b, outputs, inputs, batch.m, batch.n):
            rows += _rows(batch.tasks[first], batch.tasks[second], batch.layers, part)
    for task, layer, width, components in energies:  # one layer at a time: widths differ
        update, n = batch.updates[task], batch.n
        energy, nan = update.energy[layer][None], torch.full_like(update.energy[:1], torch.nan)
        k = torch.tensor(float(width)).to(energy)
        spread = energy**2 * energy_share_variance(n, k, update.squared_shares[layer])
        part = Part("leakage", components.sum()[None], energy, energy, energy * k / n, spread, nan)
        rows += _rows(PROTECTED, batch.tasks[task], (batch.layers[layer],), part)
    return rows


def interference_frame(adapters: AdapterSet, rows: Sequence[Row]) -> pd.DataFrame:
    """The table of `interference_table`: parts per layer, and their sums over layers."""
    keys = ["task_a", "task_b", "metric"]
    numbers = ["top", "a", "b", "random", "variance", "fourth"]
    parts = pd.DataFrame(rows, columns=[*keys, "layer", *numbers])
    parts = parts.astype(dict.fromkeys(numbers, "float64"))  # an empty table has no types of its own
    totals = parts.groupby(keys, sort=False)[numbers].sum(min_count=1).reset_index()
    totals["layer"] = "total"
    table = pd.concat([parts, totals], ignore_index=True)
    product = table["a"] * table["b"]
    bottom = product.where(product > 0) ** 0.5
    table["value"], table["chance"] = table["top"] / bottom, table["random"] / bottom
    table["chance_std"] = np.sqrt(table["variance"]) / bottom
    # excess kurtosis 3 / k of a normal number whose variance has a gamma law of shape k
    table["chance_shape"] = 3 * table["variance"] ** 2 / table["fourth"].where(table["fourth"] > 0)
    root = table["metric"].isin(SQUARED)
    table.loc[root, ["value", "chance"]] = np.sqrt(table.loc[root, ["value", "chance"]])
    for metric in HIGHEST:
        highest = parts[parts["metric"] == metric].groupby(keys, sort=False)["top"].max()
        rows_of = (table["metric"] == metric) & (table["layer"] == "total")
        table.loc[rows_of, "value"] = highest.to_numpy()
        table.loc[rows_of, "chance"] = np.nan
    orders = {
        "metric": list(table["metric"].unique()),
        "task_a": [*adapters.tasks, PROTECTED],
        "task_b": adapters.tasks,
        "layer": [*adapters.layers, "total"],
    }
    return in_order(table, orders)[COLUMNS]


def _pair(a: Triples, b: Triples, outputs: Tensor, inputs: Tensor, m: int, n: int) -> Iterator[Part]:
    """Every metric of two updates (m, n), from the r × r products of their frames."""
    nan = torch.full_like(a.energy, torch.nan)
    zero, one = torch.zeros_like(a.energy), torch.ones_like(a.energy)
    least, random = torch.minimum(a.rank, b.rank), a.rank * b.rank
    for side, inner, width in (("input", inputs, n), ("output", outputs, m)):
        top = inner.square().sum((1, 2))
        spread = overlap_variance(width, a.rank, b.rank)
        yield Part(f"{side}_overlap", top, least, least, random / width, spread, nan)
    inner = (a.values[:, :, None] * outputs * inputs * b.values[:, None, :]).sum((1, 2))
    variance = a.energy * b.energy / (m * n)
    # Excess kurtosis 6 Σp_a² Σp_b² of a sum of products of independent normal numbers, the law for large m and n.
    fourth = 6 * a.squared_shares * b.squared_shares * variance**2
    yield Part("alignment", inner, a.energy, b.energy, zero, variance, fourth)
    onto = (inputs * b.values[:, None, :]).square().sum((1, 2))
    spread = b.energy**2 * energy_share_variance(n, a.rank, b.squared_shares)
    yield Part("backward", onto, b.energy, b.energy, b.energy * a.rank / n, spread, nan)
    inside = (outputs * b.values[:, None, :]) @ inputs.mT
    expected = b.energy * a.rank**2 / (m * n)
    yield Part("forward_subspace", inside.square().sum((1, 2)), a.energy, a.energy, expected, nan, nan)
    used = a.values > torch.finfo(torch.float32).eps * a.values[:, :1]
    safe = torch.where(used, a.values, 1.0)
    corruption = torch.where(used, inside.diagonal(dim1=1, dim2=2).abs() / safe, 0.0)
    usual = (2 / np.pi) ** 0.5 * (b.energy / (m * n)).sqrt()[:, None] * torch.where(used, 1 / safe, 0.0)
    known = torch.where(a.rank > 0, one, nan)
    count = a.rank * known
    yield Part("forward_corruption", corruption.sum(1), count, count, usual.sum(1), nan, nan)
    energy = a.values.square()
    weighted, by_chance = (energy * corruption).sum(1), (energy * usual).sum(1)
    yield Part("forward_corruption_energy", weighted, a.energy, a.energy, by_chance, nan, nan)
    yield Part("forward_corruption_max", corruption.amax(1) * known, one, one, nan, nan, nan)


def overlap_variance(n: int, a: Tensor, b: Tensor) -> Tensor:
    """Variance of ``‖V_aᵀ V_b‖²`` for uniformly random subspaces of dimensions a and b in R^n."""
    return 2 * a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1) * (n + 2))


def energy_share_variance(n: int, k: Tensor, squared_shares: Tensor) -> Tensor:
    """Variance of ``Σ p_i ‖Fᵀ v_i‖²`` for a random frame v and F of k directions, `squared_shares` = Σ p²."""
    return 2 * k * (n - k) / (n * n * (n + 2)) * (n * squared_shares - 1) / max(n - 1, 1)


def _rows(task_a: str, task_b: str, layers: tuple[str, ...], part: Part) -> list[Row]:
    """One row per layer, from tensors with one number per layer."""
    columns = zip(layers, *(numbers.tolist() for numbers in part[1:]), strict=True)
    return [(task_a, task_b, part.metric, *column) for column in columns]
