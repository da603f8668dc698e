"""Partial rank correlations with a permutation null, within groups of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
FEWEST = 8
"""Rows below which a partial correlation is not given."""


@dataclass(frozen=True)
class PartialRank:
    """The partial rank correlation of one predictor, and its p-value from permutations within groups."""

    value: float
    p: float
    rows: int


def partial_ranks(
    outcome: ArrayLike,
    predictors: Mapping[str, ArrayLike],
    groups: ArrayLike,
    *,
    units: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, PartialRank]:
    """Rank correlation of the outcome with each predictor when the others are held.

    Outcome and predictors are ranked within each group and less the group's mean, so that groups may differ in level
    and scale. The null permutes, within groups, the residuals of the outcome given the other predictors
    (freedman1983nonstochastic); two-sided, never zero. A predictor that does not vary gives NaN.

    With `units`, such as layers that come back in every group, the mean of each unit is removed as well, and the null
    permutes units: in all groups alike, since the rows of one unit may depend on each other.

    Raises:
        ValueError: lengths differ, a number is NaN, there are fewer than eight rows, or a group lacks a unit or has it
            twice.

    >>> x, z = np.arange(12.0), np.tile([0.0, 1.0], 6)
    >>> round(partial_ranks(x, {"x": x, "z": z}, np.zeros(12))["x"].value, 6)
    1.0
    """
    y = np.asarray(outcome, dtype=np.float64).ravel()
    x = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in predictors.items()}
    labels = pd.factorize(np.asarray(groups).ravel())[0]
    others = None if units is None else pd.factorize(np.asarray(units).ravel())[0]
    lengths = {len(y), len(labels), *map(len, x.values()), *([] if others is None else [len(others)])}
    if len(lengths) > 1 or len(y) < FEWEST or any(np.isnan(values).any() for values in (y, *x.values())):
        raise ValueError(
            f"at least {FEWEST} rows of equal length without NaN are needed, got lengths {sorted(lengths)}"
        )
    blocks = _blocks(labels, others)
    ranked = {name: _centred(_ranks(values, labels), labels, others) for name, values in x.items()}
    target = _centred(_ranks(y, labels), labels, others)
    draw = np.random.default_rng(seed)
    return {name: _test(name, ranked, target, blocks, samples, draw) for name in ranked}


def _blocks(labels: Labels, units: Labels | None) -> list[Labels]:
    """Tables (rows, members) of row numbers whose columns are permuted: one per group, or one of all groups × units."""
    if units is None:
        return [np.flatnonzero(labels == group)[None] for group in range(labels.max() + 1)]
    counts = pd.crosstab(labels, units).to_numpy()
    if (counts != 1).any():
        raise ValueError(
            f"every group needs every unit once, but {int((counts != 1).sum())} of {counts.size} pairs of a group and "
            "a unit have no row or several: leave out units that are not in all groups"
        )
    return [np.lexsort((units, labels)).reshape(counts.shape)]


def _test(
    name: str,
    ranked: Mapping[str, Array],
    target: Array,
    blocks: Sequence[Labels],
    samples: int,
    draw: np.random.Generator,
) -> PartialRank:
    """The partial correlation of one predictor, and the share of permutations with at least its size."""
    held = [values for other, values in ranked.items() if other != name and _varies(values)]
    basis = np.linalg.qr(np.stack(held, axis=1))[0] if held else np.zeros((len(target), 0))
    own, rest = (values - basis @ (basis.T @ values) for values in (ranked[name], target))
    if not (_varies(ranked[name]) and np.linalg.norm(own) > 1e-9 * np.linalg.norm(ranked[name]) and _varies(rest)):
        return PartialRank(float("nan"), float("nan"), len(target))
    own = own / np.linalg.norm(own)
    value = float(own @ rest / np.linalg.norm(rest))
    extreme = 0
    for _ in range(samples):
        mixed = np.empty_like(rest)
        for rows in blocks:  # means of groups and units stay zero
            mixed[rows] = rest[rows[:, draw.permutation(rows.shape[1])]]
        mixed -= basis @ (basis.T @ mixed)
        size = np.linalg.norm(mixed)
        extreme += bool(size > 0 and abs(own @ mixed) / size >= abs(value) - 1e-12)
    return PartialRank(float(np.clip(value, -1.0, 1.0)), (1 + extreme) / (1 + samples), len(target))


def _ranks(values: Array, labels: Labels) -> Array:
    return np.asarray(pd.Series(values).groupby(labels).rank(), dtype=np.float64)


def _centred(values: Array, labels: Labels, units: Labels | None) -> Array:
    """Values less the means of their groups, and then of their units, which leaves the former at zero."""
    result = values - _means(values, labels)
    return result if units is None else result - _means(result, units)


def _means(values: Array, labels: Labels) -> Array:
    means = np.bincount(labels, values) / np.bincount(labels)
    return np.asarray(means[labels])


def _varies(values: Array) -> bool:
    return bool(np.abs(values).max(initial=0.0) > 1e-9)
