"""Tables for a merge of adapters: conflicts of sign before it, weights for it, and each task's loss by it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.activations import InputMoments
from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY_BUDGET, Progress, layer_batches
from analysis.adapters.merging import together
from analysis.tables.interference import Row, interference_frame

Array = NDArray[np.float64]
Criterion = Literal["mean", "worst"]
CONFLICT = "sign_conflict"
METRICS = ("retained", "foreign", "error")


def sign_conflicts(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The share of entries in which two updates have opposite signs: a table like that of `interference_table`.

    The metric is ``sign_conflict``; an entry that is zero counts half. For updates in random directions the mean is 1/2
    and the variance ``1 / (4 m n)``, exactly: docs/analysis-merge.md, "Sign conflicts". `against_chance` adds z and p.
    Dense updates are computed one layer at a time.
    """
    rows: list[Row] = []
    for batch in layer_batches(adapters, device=device, memory_budget=memory_budget, progress=progress):
        shares = [update.squared_shares.cpu() for update in batch.updates]
        for index, layer in enumerate(batch.layers):
            signs = [_signs(adapters, task, layer, device) for task in batch.tasks]
            size, variance = batch.m * batch.n, batch.m * batch.n / 4
            for a, first in enumerate(signs):
                for b in range(a + 1, len(signs)):
                    opposite = (size - float((first * signs[b]).sum(dtype=torch.int64))) / 2
                    # the law of the cosine: sign products vary with fewer large deviations (docs/analysis-merge.md)
                    fourth = 6 * float(shares[a][index] * shares[b][index]) * variance**2
                    key = (batch.tasks[a], batch.tasks[b], CONFLICT, layer)
                    rows.append((*key, opposite, float(size), float(size), size / 2, variance, fourth))
    return interference_frame(adapters, rows)


def _signs(adapters: AdapterSet, task: str, layer: str, device: torch.device | str) -> Tensor:
    left, right = adapters.factors(task, layer)
    return (left.to(device) @ right.to(device).mT).sign_().to(torch.int8)


def inner_products(adapters: AdapterSet, moments: Sequence[InputMoments] | None = None) -> list[Array]:
    """Inner products (groups, T, T) of the effects of all updates, summed over layers; one array per data set.

    With `moments`, one per data set, they are ``Σ ⟨ΔW_a x, ΔW_b x⟩ / Σ |W x|²`` per layer: relative to the layer's own
    output. Without, inputs count as white noise: ``⟨ΔW_a, ΔW_b⟩``, one array for any data (1, T, T). Layers without
    moments are left out.
    """
    size = len(adapters.tasks)
    if moments is None:
        total = torch.zeros(size, size, dtype=torch.float64)
        for batch in layer_batches(adapters):
            sides, columns = (batch.decomposition.left, batch.decomposition.right), batch.decomposition.columns
            for a, b in product(range(size), repeat=2):
                left, right = (side[..., columns[a]].mT @ side[..., columns[b]] for side in sides)
                total[a, b] += (left * right).sum()
        return [np.asarray(total)[None]]
    sums = [torch.zeros(len(each.energies[each.layers[0]]), size, size, dtype=torch.float64) for each in moments]
    for layer in [layer for layer in adapters.layers if all(layer in each.blocks for each in moments)]:
        lefts = [adapters.factors(task, layer)[0].double() for task in adapters.tasks]
        for total, each in zip(sums, moments, strict=True):
            outputs = float(each.outputs[layer].sum()) or math.inf  # a layer whose own output is zero has no scale
            for (a, task), (b, other) in product(enumerate(adapters.tasks), repeat=2):
                core = lefts[a].mT @ lefts[b]
                total[:, a, b] += (each.block(layer, task, other) * core).sum((1, 2)) / outputs
    return [np.asarray(total) for total in sums]


@dataclass(frozen=True)
class Resampling:
    """Options of intervals: groups of examples are drawn with replacement."""

    level: float = 0.95
    samples: int = 500
    seed: int = 0

    def sums(self, products: Array, data: int) -> Array:
        """Sums over groups (1 + samples, ...): the given ones first; no draws of fewer than three groups."""
        groups = len(products)
        if groups < 3:
            return np.asarray(products.sum(0)[None])
        draw = np.random.default_rng([self.seed, data])
        counts = draw.multinomial(groups, np.full(groups, 1 / groups), self.samples)
        return np.asarray(np.tensordot(np.vstack([np.ones(groups), counts]), products, axes=1))

    def described(self, values: Array) -> tuple[float, float, float]:
        """The first value, and the interval of the others; NaN where there are none."""
        if len(values) == 1:
            return float(values[0]), math.nan, math.nan
        low, high = np.quantile(values[1:], [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(values[0]), float(low), float(high)


def merge_weights(
    adapters: AdapterSet,
    moments: Sequence[InputMoments] | None = None,
    *,
    criterion: Criterion = "mean",
    resampling: Resampling = Resampling(),
) -> pd.DataFrame:
    """Weights for a sum of all updates: task, weight, ci_low, ci_high.

    They minimise the mean (or the worst) ``error`` of `merge_table` over tasks, with no weight below 0. `moments` are
    those of the inputs on each task's data, in the order of the tasks. Without them inputs count as white noise, and
    there are no intervals. Formula: docs/analysis-merge.md, "Recommended weights".

    Raises:
        ValueError: an unknown criterion, another number of moments than tasks, or a task without effect on its data.
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion is {criterion!r}, choose one of {', '.join(get_args(Criterion))}")
    sums = _per_task(adapters, adapters.tasks, moments, resampling)
    solve = _least_mean if criterion == "mean" else _least_worst
    draws = min(map(len, sums))
    found = np.array([solve([each[draw] for each in sums]) for draw in range(draws)])
    rows = [(task, *resampling.described(found[:, place])) for place, task in enumerate(adapters.tasks)]
    return pd.DataFrame(rows, columns=["task", "weight", "ci_low", "ci_high"])


def _per_task(
    adapters: AdapterSet, tasks: Sequence[str], moments: Sequence[InputMoments] | None, resampling: Resampling
) -> list[Array]:
    """Per task t: products (1 + samples, T, T) on its data, divided by the energy of its own update's effect."""
    if moments is not None and len(moments) != len(tasks):
        raise ValueError(f"{len(moments)} data sets for {len(tasks)} tasks: give the inputs of each task's own data")
    products = inner_products(adapters, moments)
    sums = []
    for place, task in enumerate(tasks):
        data = place if moments is not None else 0
        drawn = resampling.sums(products[data], data)
        own = drawn[:, place, place]
        if not (own > 0).all():
            raise ValueError(f"{task}: the update changes no output of its own data, so no share of it can be kept")
        sums.append(drawn / own[:, None, None])
    return sums


def _least_mean(products: Sequence[Array]) -> Array:
    """Weights ≥ 0 with the least mean error: non-negative least squares on a root of the mean product."""
    from scipy import optimize

    inner = np.mean(products, axis=0)
    target = np.mean([each[:, place] for place, each in enumerate(products)], axis=0)
    values, vectors = np.linalg.eigh(inner)
    used = values > 1e-12 * values.max()  # equal updates: any share of them is as good
    root = (vectors[:, used] * np.sqrt(values[used])).T
    weights, _ = optimize.nnls(root, (vectors[:, used] / np.sqrt(values[used])).T @ target)
    return np.asarray(weights)


def _least_worst(products: Sequence[Array]) -> Array:
    """Weights ≥ 0 with the least error of the worst task, from the least mean on."""
    from scipy import optimize

    start = _least_mean(products)

    def errors(weights: Array) -> Array:
        return np.array([_error(each, place, weights) for place, each in enumerate(products)])

    size = len(start)
    result = optimize.minimize(
        lambda x: x[-1],
        np.append(start, errors(start).max()),
        jac=lambda x: np.append(np.zeros(size), 1.0),
        bounds=[(0, None)] * size + [(None, None)],
        constraints={"type": "ineq", "fun": lambda x: x[-1] - errors(x[:-1])},
        method="SLSQP",
    )
    best = np.asarray(result.x[:-1])
    return best if errors(best).max() <= errors(start).max() else start


def _error(products: Array, place: int, weights: Array) -> float:
    difference = weights - np.eye(len(weights))[place]
    return float(difference @ products @ difference)


def merge_table(
    adapters: AdapterSet,
    merged: AdapterSet,
    moments: Sequence[InputMoments] | None = None,
    *,
    resampling: Resampling = Resampling(),
) -> pd.DataFrame:
    """Effects of each merged update on each task: rule, task, metric, value, ci_low, ci_high.

    On the task's inputs, M being the merged update and ΔW the task's own: ``retained`` = ``⟨M x, ΔW x⟩ / |ΔW x|²``, 1
    where the task's change is there in full; ``foreign``, the rest of ``|M x|²`` divided by ``|ΔW x|²``; and ``error``
    = ``|M x − ΔW x|² / |ΔW x|²`` = (1 − retained)² + foreign. An error of 1 is that of leaving the task out.

    Args:
        adapters: the updates of the tasks.
        merged: the merged updates, one task per rule.
        moments: per task, those of `together(adapters, merged)` on the task's data; without them inputs count as
            white noise.
        resampling: level and number of draws of the intervals.

    Raises:
        ValueError: another number of moments than tasks, or a task without effect on its data.
    """
    both = together(adapters, merged)
    sums = _per_task(both, adapters.tasks, moments, resampling)
    rows = []
    for position, rule in enumerate(merged.tasks, start=len(adapters.tasks)):
        for place, task in enumerate(adapters.tasks):
            products = sums[place]
            retained = products[:, position, place]
            foreign = products[:, position, position] - retained**2
            for metric, values in zip(METRICS, (retained, foreign, (1 - retained) ** 2 + foreign), strict=True):
                rows.append((rule, task, metric, *resampling.described(values)))
    return pd.DataFrame(rows, columns=["rule", "task", "metric", "value", "ci_low", "ci_high"])


def drift_table(
    adapters: AdapterSet,
    data: Mapping[str, InputMoments],
    *,
    resampling: Resampling = Resampling(),
) -> pd.DataFrame:
    """Relative functional drift of every update on every data set: data, task, value, ci_low, ci_high.

    ``Σ |ΔW x|² / Σ |W x|²`` on the data's inputs, mean over layers: how much of a layer's output the update alone
    changes. `data` is the name of a data set to its moments.
    """
    layers = [layer for layer in adapters.layers if all(layer in each.blocks for each in data.values())]
    layers = [layer for layer in layers if all(each.outputs[layer].any() for each in data.values())]
    products = inner_products(adapters, list(data.values()))
    rows = []
    for number, (name, moments) in enumerate(data.items()):
        effects = np.diagonal(products[number], axis1=1, axis2=2)
        outputs = sum(np.asarray(moments.outputs[layer] / moments.outputs[layer].sum()) for layer in layers)
        # the outputs of a draw change with its examples too: both are drawn together
        sums = resampling.sums(np.concatenate([effects, np.reshape(outputs, (-1, 1))], axis=1), number)
        drift = sums[:, :-1] / sums[:, -1:]
        rows += [(name, task, *resampling.described(drift[:, a])) for a, task in enumerate(adapters.tasks)]
    return pd.DataFrame(rows, columns=["data", "task", "value", "ci_low", "ci_high"])
