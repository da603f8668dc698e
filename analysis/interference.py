"""How the updates of different tasks meet: overlap, alignment, leakage."""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import AdapterSet
from analysis.buckets import layer_batches, stacked_factors

PROTECTED = "protected"
"""What stands in task_a for the subspace that was protected before task_b."""


class _Update(NamedTuple):
    """One task's updates of equally shaped layers, ``ΔW = U diag(s) Vᵀ``."""

    left: Tensor  # (L, m, r), columns beyond the numerical rank are zero
    right: Tensor  # (L, n, r), likewise
    values: Tensor  # (L, r)
    rank: Tensor  # (L,)
    energy: Tensor  # (L,)


def interference_table(
    adapters: AdapterSet, device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float64
) -> pd.DataFrame:
    """Tidy interference of every pair of tasks: task_a, task_b, layer, metric, value, chance.

    `task_a` comes before `task_b` in the order of learning, so each pair occurs once.

    * ``input_overlap`` = ``‖V_aᵀ V_b‖² / min(r_a, r_b)`` for orthonormal bases V of the row spaces, the mean
      squared cosine of their principal angles, in [0, 1];
    * ``output_overlap``, the same of the column spaces;
    * ``alignment``, the cosine ``⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖)``, in [−1, 1];
    * ``leakage`` = ``‖ΔW_b F‖² / ‖ΔW_b‖²``, the share of the later update's energy that acts on the subspace F
      protected before it, in [0, 1]. These rows have ``task_a = "protected"``, because F stands for all
      earlier tasks; they exist where a run folder holds the subspace.

    Ranks are numerical: a direction below the float32 rounding of the largest one does not count, so a
    rank-deficient adapter does not overlap by directions that it never uses. A row with layer ``"total"``
    adds numerators and denominators over layers; the total alignment is the cosine of the concatenated
    updates. `chance` is the mean for uniformly random subspaces of the same dimensions: ``max(r_a, r_b)``
    over n or m, 0 and ``k / n``. An update that is zero has NaN.

    Cost: O((m + n) R²) a layer for R the sum of all ranks; ΔW is never formed.
    """
    # Every metric is top / √(a b): then sums over layers of the four parts give the total by the same rule.
    keys = ["task_a", "task_b", "metric"]
    numbers = ["top", "a", "b", "random"]
    parts = pd.DataFrame(_parts(adapters, device, dtype), columns=[*keys, "layer", *numbers])
    parts = parts.astype(dict.fromkeys(numbers, "float64"))  # an empty table has no types of its own
    totals = parts.groupby(keys, sort=False)[numbers].sum().reset_index()
    totals["layer"] = "total"
    table = pd.concat([parts, totals], ignore_index=True)
    bottom = np.sqrt(table["a"] * table["b"])
    table["value"], table["chance"] = table["top"] / bottom, table["random"] / bottom
    order = np.lexsort(
        [table[column].map(_places(values)) for column, values in reversed(_orders(adapters, table).items())]
    )
    return table.iloc[order].reset_index(drop=True)[["task_a", "task_b", "layer", "metric", "value", "chance"]]


def _places(values: tuple[str, ...]) -> dict[str, int]:
    return {value: place for place, value in enumerate(values)}


def _orders(adapters: AdapterSet, table: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """The order of rows, most significant column first."""
    return {
        "metric": tuple(dict.fromkeys(table["metric"])),
        "task_a": (*adapters.tasks, PROTECTED),
        "task_b": adapters.tasks,
        "layer": (*adapters.layers, "total"),
    }


def _parts(adapters: AdapterSet, device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str | float, ...]]:
    """Numerator, the two factors of the squared denominator, and the numerator expected by chance."""
    for layers in layer_batches(adapters):
        lefts, rights = stacked_factors(adapters, layers, device=device, dtype=dtype)
        updates = [_decompose(left, right) for left, right in zip(lefts, rights, strict=True)]
        for (task_a, a), (task_b, b) in combinations(zip(adapters.tasks, updates, strict=True), 2):
            inner_left, inner_right = a.left.mT @ b.left, a.right.mT @ b.right
            inner = (a.values[:, :, None] * inner_left * inner_right * b.values[:, None, :]).sum((1, 2))
            least, random = torch.minimum(a.rank, b.rank), a.rank * b.rank
            for side, shared, width in (
                ("input", inner_right, a.right.shape[1]),
                ("output", inner_left, a.left.shape[1]),
            ):
                top = shared.square().sum((1, 2))
                yield from _rows(task_a, task_b, f"{side}_overlap", layers, top, least, least, random / width)
            none = torch.zeros_like(inner)
            yield from _rows(task_a, task_b, "alignment", layers, inner, a.energy, b.energy, none)
        for task, update in zip(adapters.tasks, updates, strict=True):
            yield from _leakage(adapters, task, layers, update)


def _decompose(left: Tensor, right: Tensor) -> _Update:
    """Singular triples of ``left rightᵀ`` by thin QR of both factors and the SVD of the r × r core."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, values, vt = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    # The factors were rounded to float32: what is smaller than that is not a direction of the update.
    used = (values > torch.finfo(torch.float32).eps * values[:, :1]).to(values.dtype)
    return _Update(
        left=q_left @ u * used[:, None, :],
        right=q_right @ vt.mT * used[:, None, :],
        values=values,
        rank=used.sum(-1),
        energy=values.square().sum(-1),
    )


def _leakage(
    adapters: AdapterSet, task: str, layers: tuple[str, ...], update: _Update
) -> Iterator[tuple[str | float, ...]]:
    """One row for every layer that has a protected subspace; their widths differ, so layer by layer."""
    for place, layer in enumerate(layers):
        basis = adapters.protected(task, layer)
        if basis is None:
            continue
        onto = update.right[place].mT @ basis.to(update.right)
        top = (update.values[place, :, None] * onto).square().sum()
        energy = update.energy[place]
        random = energy * (basis.shape[1] / basis.shape[0])
        yield PROTECTED, task, "leakage", layer, *(part.item() for part in (top, energy, energy, random))


def _rows(
    task_a: str, task_b: str, metric: str, layers: tuple[str, ...], *parts: Tensor
) -> Iterator[tuple[str | float, ...]]:
    """One row a layer, from tensors with one number a layer."""
    for layer, *numbers in zip(layers, *(part.tolist() for part in parts), strict=True):
        yield task_a, task_b, metric, layer, *numbers
