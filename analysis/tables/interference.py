"""How the updates of different tasks meet: overlap, alignment, leakage, corruption."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY, Progress, layer_batches, stacked_factors
from analysis.formats import Checkpoint
from analysis.names import matched_names
from analysis.numerics.decomposition import Triples, shared, triples
from analysis.tables.activations import Covariances, activation_parts

PROTECTED = "protected"
"""What stands in task_a for the subspace that was protected before task_b."""
COLUMNS = ["task_a", "task_b", "layer", "metric", "value", "chance", "chance_std", "chance_shape"]
SQUARED = ("forward_subspace",)
"""Metrics whose parts are energies and whose value is the square root."""
HIGHEST = ("forward_corruption_max",)
"""Metrics whose total is the largest layer's, not a ratio of sums."""


class Part(NamedTuple):
    """One number a layer as ``top / √(a b)``, so that sums over layers give the total by the same rule."""

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
    memory: int = MEMORY,
    protected: Mapping[str, Tensor] | None = None,
    covariances: Covariances | None = None,
    base: Checkpoint | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy interference of every pair of tasks: task_a, task_b, layer, metric, value, chance, chance_std, chance_shape.

    `task_a` comes before `task_b` in the order of learning, so each pair occurs once. With singular triples
    ``ΔW = U diag(σ) Vᵀ``:

    * ``input_overlap`` = ``‖V_aᵀ V_b‖² / min(r_a, r_b)``, the mean squared cosine of the principal angles of
      the row spaces, in [0, 1];
    * ``output_overlap``, the same of the column spaces;
    * ``alignment``, the cosine ``⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖)``, in [−1, 1];
    * ``backward`` = ``‖ΔW_b V_a‖² / ‖ΔW_b‖²``, the share of the later update's energy that acts on the inputs
      that the earlier one uses, in [0, 1];
    * ``forward_subspace`` = ``‖U_aᵀ ΔW_b V_a‖ / ‖ΔW_a‖``, the later update inside the earlier one's frames;
    * ``forward_corruption`` = ``|u_iᵀ ΔW_b v_i| / σ_i`` of the components i of task a, their mean, weighted by
      energy (``forward_corruption_energy``), and the largest (``forward_corruption_max``);
    * ``leakage`` = ``‖ΔW_b F‖² / ‖ΔW_b‖²``, the share of the later update's energy that acts on the subspace F
      protected before it, in [0, 1]. These rows have ``task_a = "protected"``, because F stands for all
      earlier tasks; they exist where a run folder holds the subspace, or where `protected` gives one.

    With `covariances`, second moments ``C = E[x xᵀ]`` of the inputs on each task's data:

    * ``activation_drift`` = ``tr(ΔW_b C_a ΔW_bᵀ) / (‖ΔW_b‖² tr(C_a) / n)``, 1 for an update that meets task a's
      inputs as it would meet white noise;
    * ``activation_alignment`` = ``tr(ΔW_a C_a ΔW_bᵀ)`` over the root of ``tr(ΔW_a C_a ΔW_aᵀ) tr(ΔW_b C_a ΔW_bᵀ)``;
    * ``activation_drift_relative`` = ``tr(ΔW_b C_a ΔW_bᵀ) / tr(W C_a Wᵀ)``, when `base` is given.

    Ranks are numerical: a direction below the float32 rounding of the largest one does not count, so a
    rank-deficient adapter does not overlap by directions that it never uses. A row with layer ``"total"``
    adds numerators and denominators over layers; the total alignment is the cosine of the concatenated
    updates. `chance` is the mean (for ``forward_subspace`` the root mean square) for frames drawn uniformly at
    random with these spectra, `chance_std` its standard deviation and `chance_shape` the shape of the
    cosine's law where closed forms exist (`against_chance` makes z-scores and p-values of them). A metric of an
    update that is zero is NaN.

    Cost: O((m + n) R²) a layer for R the sum of all ranks; ΔW is never formed.

    Args:
        adapters: the updates, tasks in order.
        device: where it is computed.
        dtype: precision.
        memory: budget in bytes; what is needed does not grow with the number of layers.
        protected: layer name to orthonormal basis (n, k), used for every task instead of what a run holds.
        covariances: task to layer to C (n, n), or a root (n, k) of it, ``C = root rootᵀ``.
        base: the model that was adapted.
        progress: told the layers done and all of them.

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
    protected = bases_by_layer(adapters, protected)
    keys = ["task_a", "task_b", "metric"]
    numbers = ["top", "a", "b", "random", "variance", "fourth"]
    rows: list[tuple[str | float, ...]] = []
    for layers in layer_batches(adapters, memory=memory, progress=progress):
        lefts, rights = stacked_factors(adapters, layers, device=device, dtype=dtype)
        updates = [triples(left, right) for left, right in zip(lefts, rights, strict=True)]
        named = list(zip(adapters.tasks, updates, strict=True))
        for first, second, outputs, inputs in shared(updates):
            (task_a, a), (task_b, b) = named[first], named[second]
            for part in _pair(a, b, outputs, inputs):
                rows += _rows(task_a, task_b, layers, part)
        for task, update in named:
            for place, layer in enumerate(layers):
                basis = protected.get(layer) if protected is not None else adapters.protected(task, layer)
                if basis is not None:
                    rows += _rows(PROTECTED, task, (layer,), _leakage(layer, basis, update, place))
        if covariances is not None:
            for task_a, task_b, layer, metric, *found in activation_parts(adapters, layers, named, covariances, base):
                rows.append((task_a, task_b, metric, layer, *found, np.nan, np.nan))
    parts = pd.DataFrame(rows, columns=[*keys, "layer", *numbers])
    parts = parts.astype(dict.fromkeys(numbers, "float64"))  # an empty table has no types of its own
    totals = parts.groupby(keys, sort=False)[numbers].sum(min_count=1).reset_index()
    totals["layer"] = "total"
    table = _values(pd.concat([parts, totals], ignore_index=True))
    for metric in HIGHEST:
        highest = parts[parts["metric"] == metric].groupby(keys, sort=False)["top"].max()
        rows_of = (table["metric"] == metric) & (table["layer"] == "total")
        table.loc[rows_of, "value"] = highest.to_numpy()
        table.loc[rows_of, "chance"] = np.nan
    order = np.lexsort(
        [table[column].map(_places(values)) for column, values in reversed(_orders(adapters, table).items())]
    )
    return table.iloc[order].reset_index(drop=True)[COLUMNS]


def bases_by_layer(adapters: AdapterSet, protected: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The subspaces by the adapters' names of their layers; theirs may be those of another version of transformers.

    Raises:
        ValueError: subspaces are given and none of them belongs to an adapted layer: they are another model's.
    """
    if protected is None:
        return None
    names = matched_names(adapters.layers, protected)
    if not names:
        raise ValueError(
            f"none of the {len(protected)} protected layers is adapted: they are called like "
            f"{next(iter(protected), 'nothing')}, the adapters' like {adapters.layers[0]}"
        )
    return {layer: protected[name] for layer, name in names.items()}


def _values(table: pd.DataFrame) -> pd.DataFrame:
    """Value, chance and its spread from the parts."""
    product = table["a"] * table["b"]
    bottom = product.where(product > 0) ** 0.5
    table["value"], table["chance"] = table["top"] / bottom, table["random"] / bottom
    table["chance_std"] = np.sqrt(table["variance"]) / bottom
    # excess kurtosis 3 / k of a normal number whose variance has a gamma law of shape k
    table["chance_shape"] = 3 * table["variance"] ** 2 / table["fourth"].where(table["fourth"] > 0)
    root = table["metric"].isin(SQUARED)
    table.loc[root, ["value", "chance"]] = np.sqrt(table.loc[root, ["value", "chance"]])
    return table


def _places(values: tuple[str, ...]) -> dict[str, int]:
    return {value: place for place, value in enumerate(values)}


def _orders(adapters: AdapterSet, table: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """The order of rows, most significant column first."""
    return {
        "metric": tuple(dict.fromkeys(table["metric"])),
        "task_a": (*adapters.tasks, PROTECTED),
        "task_b": (*adapters.tasks,),
        "layer": (*adapters.layers, "total"),
    }


def _pair(a: Triples, b: Triples, outputs: Tensor, inputs: Tensor) -> Iterator[Part]:
    """Every metric of two updates, from the r × r products of their frames."""
    m, n = a.q_left.shape[1], a.q_right.shape[1]
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
    yield Part("alignment", inner, a.energy, b.energy, zero, variance, 6 * a.fourth * b.fourth * variance**2)
    onto = (inputs * b.values[:, None, :]).square().sum((1, 2))
    spread = b.energy**2 * energy_share_variance(n, a.rank, b.fourth)
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


def energy_share_variance(n: int, k: Tensor, fourth: Tensor) -> Tensor:
    """Variance of ``Σ p_i ‖Fᵀ v_i‖²`` for a random frame v and F of k directions, `fourth` = Σ p²."""
    return 2 * k * (n - k) / (n * n * (n + 2)) * (n * fourth - 1) / max(n - 1, 1)


def _leakage(layer: str, basis: Tensor, update: Triples, place: int) -> Part:
    """One layer: the widths of protected subspaces differ."""
    n = update.q_right.shape[1]
    if basis.ndim != 2 or basis.shape[0] != n:
        raise ValueError(f"{layer}: the protected basis has shape {tuple(basis.shape)}, ({n}, k) was expected")
    onto = update.frames(place)[1].mT @ basis.to(update.q_right)
    top = (update.values[place, :, None] * onto).square().sum()[None]
    energy, k = update.energy[place][None], torch.tensor(float(basis.shape[1])).to(update.energy)
    spread = energy**2 * energy_share_variance(n, k, update.fourth[place])
    return Part("leakage", top, energy, energy, energy * k / n, spread, torch.full_like(energy, torch.nan))


def _rows(task_a: str, task_b: str, layers: tuple[str, ...], part: Part) -> list[tuple[str | float, ...]]:
    """One row a layer, from tensors with one number a layer."""
    columns = zip(layers, *(numbers.tolist() for numbers in part[1:]), strict=True)
    return [(task_a, task_b, part.metric, *column) for column in columns]
