"""Tidy tables of principal angles between updates, and of the rank-one components of each."""

from collections.abc import Iterator, Mapping, Sequence

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
from analysis.numerics.decomposition import Triples
from analysis.tables.frames import in_order

AngleRow = tuple[str | float | int, ...]
ANGLE_COLUMNS = ["task_a", "task_b", "layer", "side", "width", "rank_a", "rank_b", "index", "cosine", "angle"]


def principal_angles(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy principal angles: task_a, task_b, layer, side, width, rank_a, rank_b, index, cosine, angle.

    Angles in radians, ascending, from cosines and sines (bjorck1973angles); `width` is the dimension of the space that
    both subspaces lie in. Sides are ``"input"`` (row spaces) and ``"output"`` (column spaces); there are min(r_a, r_b)
    angles, of the directions that both updates use. An update that is zero has none.

    >>> eye, both = torch.eye(3), torch.ones(3, 1)
    >>> two = AdapterSet.from_factors({"a": {"x": (both, eye[:, :1])}, "b": {"x": (both, eye[:, :1] + eye[:, 1:2])}})
    >>> [round(angle, 4) for angle in principal_angles(two)["angle"].abs()]  # π/4 between inputs, equal outputs
    [0.7854, 0.0]
    """
    rows: list[AngleRow] = []
    for batch in layer_batches(adapters, device=device, memory_budget=memory_budget, progress=progress):
        rows += angle_rows(batch)
    return pd.DataFrame(rows, columns=ANGLE_COLUMNS)


def angle_rows(batch: LayerBatch) -> list[AngleRow]:
    """The rows of `principal_angles` of one batch."""
    rows: list[AngleRow] = []
    for first, second, outputs, inputs in batch.decomposition.pairs():
        a, b = batch.updates[first], batch.updates[second]
        ranks = list(zip(a.rank.int().tolist(), b.rank.int().tolist(), strict=True))
        for side, inner, width in (("input", inputs, batch.n), ("output", outputs, batch.m)):
            angles = _angles(a, b, inner, side, ranks)
            for layer, pair, found in zip(batch.layers, ranks, angles, strict=True):
                key = (batch.tasks[first], batch.tasks[second], layer, side, width, *pair)
                rows += [(*key, i, cosine, angle) for i, (cosine, angle) in enumerate(found, start=1)]
    return rows


def _angles(
    a: Triples, b: Triples, inner: Tensor, side: str, ranks: Sequence[tuple[int, int]]
) -> Iterator[list[tuple[float, float]]]:
    """(cosine, angle) of every layer. Sines replace cosines where an angle is below π/4."""
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    angles = cosines.acos()
    for position in (cosines > 0.5**0.5).any(-1).nonzero().flatten().tolist():
        small, large = (a, b) if ranks[position][0] <= ranks[position][1] else (b, a)
        x, y = ((update.right if side == "input" else update.left)[position] for update in (small, large))
        x = x[:, : min(ranks[position])]
        sines = torch.linalg.svdvals(x - y @ (y.mT @ x)).flip(-1).clamp(max=1.0)
        exact = angles[position, : len(sines)]
        angles[position, : len(sines)] = torch.where(cosines[position, : len(sines)] > 0.5**0.5, sines.asin(), exact)
    for position, pair in enumerate(ranks):
        count = min(pair)
        yield list(zip(cosines[position, :count].tolist(), angles[position, :count].tolist(), strict=True))


def component_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    protected: Mapping[str, Tensor] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy rank-one components: task, layer, component, sigma, energy_share, backward_share, forward_corruption.

    Formulas: docs/analysis.md, "Interference". ``backward_share`` is NaN where nothing is protected, and
    ``forward_corruption`` for the last task.

    Raises:
        ValueError: a basis does not fit its layer, or no protected layer is an adapted one.

    >>> eye = torch.eye(3)
    >>> a = (eye[:, :2] * torch.tensor([2.0, 1.0]), eye[:, :2])
    >>> b = (eye[:, :2] * torch.tensor([0.5, 0.5]), eye[:, :2])
    >>> found = component_table(AdapterSet.from_factors({"a": {"x": a}, "b": {"x": b}}), protected={"x": eye})
    >>> found[found["task"] == "a"][["energy_share", "backward_share", "forward_corruption"]].to_numpy().tolist()
    [[0.8, 0.8, 0.25], [0.2, 0.2, 0.5]]
    """
    basis_of = protected_bases(adapters, protected)
    frames: list[pd.DataFrame] = []
    for batch in layer_batches(adapters, device=device, memory_budget=memory_budget, progress=progress):
        frames += component_frames(batch, protected_energies(batch, basis_of))
    return component_frame(adapters, frames)


def component_frames(batch: LayerBatch, energies: Sequence[ProtectedEnergy]) -> list[pd.DataFrame]:
    """The rows of `component_table` of one batch, one frame per task."""
    inside = [torch.zeros_like(update.values) for update in batch.updates]
    for a, b, outputs, inputs in batch.decomposition.pairs():
        inside[a] = inside[a] + (outputs * batch.updates[b].values[:, None, :] * inputs).sum(-1)
    inside[-1].fill_(torch.nan)
    shares = [torch.full_like(update.values, torch.nan) for update in batch.updates]
    for task, layer, _, components in energies:
        shares[task][layer] = components / components.sum()
    frames = []
    for task, update in enumerate(batch.updates):
        numbers = torch.arange(update.values.shape[-1], device=update.values.device)
        index, component = (numbers < update.rank[:, None]).nonzero(as_tuple=True)
        sigma = update.values[index, component]
        columns = {
            "layer": np.array(batch.layers, dtype=object)[index.cpu().numpy()],
            "component": (component + 1).cpu().numpy(),
            "sigma": sigma.cpu().numpy(),
            "energy_share": (sigma.square() / update.energy[index]).cpu().numpy(),
            "backward_share": shares[task][index, component].cpu().numpy(),
            "forward_corruption": (inside[task][index, component].abs() / sigma).cpu().numpy(),
        }
        frames.append(pd.DataFrame({"task": batch.tasks[task], **columns}))
    return frames


def component_frame(adapters: AdapterSet, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The table of `component_table`, in the order of the adapters."""
    return in_order(pd.concat(frames, ignore_index=True), {"task": adapters.tasks, "layer": adapters.layers})
