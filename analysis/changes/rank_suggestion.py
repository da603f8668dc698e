"""Ranks that keep a stated share of an update's energy, or of its effect on given inputs."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.activations import InputMoments
from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import Progress
from analysis.changes.compression import compressed, leading, output_moments
from analysis.numerics.decomposition import triples
from analysis.statistics.prediction import share_prediction

Array = NDArray[np.float64]
Criterion = Literal["energy", "drift"]
FOLDS = 32
"""Parts of the data: the share kept on each is measured with directions from the others."""
ROUNDING = float(np.finfo(np.float32).eps)
"""A share of the energy that float32 factors do not resolve."""


CURVE = ["task", "layer", "rank", "kept", "ci_low", "ci_high"]
TABLE = ["task", "layer", "m", "n", "rank_before", "rank", "kept", "ci_low", "ci_high"]


@dataclass(frozen=True, eq=False)
class RankSuggestion:
    """The smallest rank per layer that keeps a share of the update, and what every other rank keeps."""

    adapters: AdapterSet
    keep: float
    criterion: Criterion
    curve: pd.DataFrame
    """task, layer, rank, kept, ci_low, ci_high: one row per layer and rank, up to the layer's present rank.

    `kept` is in [0, 1]. For ``"energy"`` it is exact and the interval has no width. For ``"drift"`` it is measured on
    data that did not choose the directions, and the interval is for as many new examples of the same kind.
    """
    moments: InputMoments | None = None

    @cached_property
    def table(self) -> pd.DataFrame:
        """task, layer, m, n, rank_before, rank, kept, ci_low, ci_high: one row per layer, at its suggested rank."""
        enough = self.curve[self.curve["ci_low"] >= self.keep]
        chosen = enough.groupby(["task", "layer"], sort=False).first().reset_index()
        shapes = [self.adapters.shape(task, layer) for task, layer in zip(chosen["task"], chosen["layer"], strict=True)]
        sizes = pd.DataFrame(shapes, columns=["m", "n", "rank_before"])
        return pd.concat([chosen, sizes], axis=1)[TABLE]

    @property
    def ranks(self) -> dict[str, dict[str, int]]:
        """Task to layer to suggested rank."""
        ranks: dict[str, dict[str, int]] = {}
        for task, layer, rank in zip(*(self.table[key] for key in ("task", "layer", "rank")), strict=True):
            ranks.setdefault(task, {})[layer] = int(rank)
        return ranks

    @property
    def uniform_rank(self) -> int:
        """The smallest single rank that keeps the share in every layer of every task."""
        return int(self.table["rank"].max())

    @property
    def parameters(self) -> tuple[int, int, int]:
        """Numbers in the factors of the table's layers: now, at the suggested ranks, and at the one rank for all."""
        table = self.table
        per_rank = table["m"] + table["n"]
        one = np.minimum(table["rank_before"], self.uniform_rank)
        return tuple(int((per_rank * rank).sum()) for rank in (table["rank_before"], table["rank"], one))  # type: ignore[return-value]

    def compressed(self, *, uniform: bool = False) -> AdapterSet:
        """The adapters at the suggested ranks, or all at `uniform_rank`.

        For ``"energy"`` the leading singular triples stay. For ``"drift"`` outputs are projected onto their leading
        directions on the given inputs, the best choice for these inputs.
        """
        ranks = self.ranks
        if uniform:
            ranks = {task: dict.fromkeys(of_task, self.uniform_rank) for task, of_task in ranks.items()}
        return compressed(self.adapters, ranks, moments=self.moments)


def suggest_ranks(
    adapters: AdapterSet,
    keep: float = 0.95,
    *,
    moments: InputMoments | None = None,
    layers: Collection[str] | None = None,
    level: float = 0.98,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> RankSuggestion:
    """The smallest rank per layer that keeps the share `keep` of the update.

    Without `moments` the share is one of energy, ``Σ_{i≤k} σ_i² / Σ σ_i²``, and exact. With them it is one of the drift
    ``E‖ΔW x‖²`` on the inputs that they are about: the rank is the smallest whose interval lies above `keep`.
    Directions are then the leading ones of the outputs ``ΔW x``, as in activation-aware compression (yuan2023asvd,
    wang2024svdllm); the cross-fitted interval is ours. Every layer keeps at least rank 1. A zero update keeps
    everything at rank 1.

    Args:
        adapters: the updates.
        keep: share in (0, 1].
        moments: second moments of the layers' inputs. Layers without them stay.
        layers: those that may change; all if not given. The others stay, and are in no table.
        level: of the interval, without effect for energy; 0.98 by default, so that inputs with heavy tails keep 0.95.
        samples: of the interval.
        seed: of the interval.
        progress: called with the number of finished updates and of all.

    Raises:
        ValueError: `keep` is outside (0, 1], or the moments have fewer than 8 groups of examples.

    >>> eye = torch.eye(4)
    >>> steep = {"a": {"x": (eye[:, :3] * torch.tensor([3.0, 1.0, 0.1]), eye[:, :3])}}
    >>> found = suggest_ranks(AdapterSet.from_factors(steep), 0.95)
    >>> found.curve["kept"].round(4).tolist(), found.ranks, found.parameters
    ([0.8991, 0.999, 1.0], {'a': {'x': 2}}, (24, 16, 16))
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, a share above 0 and at most 1 was expected")
    rows: list[pd.DataFrame] = []
    for done, (task, layer, left, right) in enumerate(adapters, start=1):
        if (layers is not None and layer not in layers) or (moments is not None and layer not in moments.blocks):
            continue
        if moments is None:
            kept = low = high = _energy_kept(left, right)
        else:
            core = output_moments(left, moments.block(layer, task))[1]
            kept, low, high = _drift_kept(core, level=level, samples=samples, seed=seed)
        columns = {"rank": np.arange(1, len(kept) + 1), "kept": kept, "ci_low": low, "ci_high": high}
        rows.append(pd.DataFrame({"task": task, "layer": layer, **columns})[CURVE])
        if progress is not None:
            progress(done, len(adapters))
    if not rows:
        raise ValueError("no layer is left to compress: none of those that may change has moments")
    curve = pd.concat(rows, ignore_index=True)
    return RankSuggestion(adapters, keep, "energy" if moments is None else "drift", curve, moments)


def _energy_kept(left: Tensor, right: Tensor) -> Array:
    """Share of the energy in the k leading singular values, for every k (r,)."""
    values = triples(left.double()[None], right.double()[None]).values[0].numpy()
    energies = values[::-1] ** 2
    total = float(energies.sum())
    if total == 0:
        return np.ones(len(values))
    lost = np.concatenate([np.cumsum(energies)[::-1][1:], [0.0]]) / total  # small terms first: no cancellation
    return np.where(lost <= ROUNDING**2, 1.0, 1.0 - lost)


def _drift_kept(core: Tensor, *, level: float, samples: int, seed: int) -> tuple[Array, Array, Array]:
    """Share of the drift that the k leading output directions keep, for every k, and the ends of its interval."""
    totals = core.diagonal(dim1=1, dim2=2).sum(-1)
    core = core[totals > 0]  # a group without examples, or without an effect, shows nothing
    rank = core.shape[-1]
    if len(core) == 0:
        return np.ones(rank), np.ones(rank), np.ones(rank)
    energies = torch.empty(len(core), rank, dtype=core.dtype)
    for fold in _folds(len(core)):
        inside = torch.zeros(len(core), dtype=torch.bool)
        inside[fold] = True
        axes = leading(core[~inside].sum(0)) if not inside.all() else leading(core.sum(0))
        energies[inside] = torch.einsum("ik,gij,jk->gk", axes, core[inside], axes).clamp(min=0.0)
    total = energies.sum(-1)
    lost = energies.flip(-1).cumsum(-1).flip(-1)[:, 1:]  # what the ranks 1, ..., r − 1 lose
    share, low, high = share_prediction(lost.numpy(), total.numpy(), level=level, samples=samples, seed=seed)
    ends = [np.concatenate([1.0 - np.where(s <= ROUNDING**2, 0.0, s), [1.0]]) for s in (share, high, low)]
    return ends[0], ends[1], ends[2]


def _folds(groups: int) -> Iterator[Sequence[int]]:
    """Indices of the groups in each of `FOLDS` parts."""
    for fold in range(min(FOLDS, groups)):
        yield range(fold, groups, FOLDS)
