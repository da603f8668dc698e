"""What stands behind the interference of updates: single angles and single components."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY, Progress, layer_batches, stacked_factors
from analysis.numerics.decomposition import Triples, shared, triples
from analysis.tables.interference import bases_by_layer


def principal_angles(
    adapters: AdapterSet, device: torch.device | str = "cpu", *, memory: int = MEMORY, progress: Progress | None = None
) -> pd.DataFrame:
    """Tidy principal angles: task_a, task_b, layer, side, width, rank_a, rank_b, index, cosine, angle.

    Angles in radians, ascending; `width` is the dimension of the space that both subspaces lie in.
    Sides are ``"input"`` (row spaces) and ``"output"`` (column spaces); there are min(r_a, r_b) angles, of the
    directions that both updates use. An update that is zero has none. Angles come from cosines and sines
    (bjorck1973angles), so small ones keep their digits.

    >>> eye, both = torch.eye(3), torch.ones(3, 1)
    >>> two = AdapterSet.from_factors({"a": {"x": (both, eye[:, :1])}, "b": {"x": (both, eye[:, :1] + eye[:, 1:2])}})
    >>> [round(angle, 4) for angle in principal_angles(two)["angle"].abs()]  # π/4 between inputs, equal outputs
    [0.7854, 0.0]
    """
    rows: list[tuple[str | float | int, ...]] = []
    for layers in layer_batches(adapters, memory=memory, progress=progress):
        lefts, rights = stacked_factors(adapters, layers, device=device, dtype=torch.float64)
        updates = [triples(left, right) for left, right in zip(lefts, rights, strict=True)]
        for first, second, outputs, inputs in shared(updates):
            a, b = updates[first], updates[second]
            ranks = list(zip(a.rank.int().tolist(), b.rank.int().tolist(), strict=True))
            for side, inner, width in (("input", inputs, a.q_right.shape[1]), ("output", outputs, a.q_left.shape[1])):
                angles = _angles(a, b, inner, side, ranks)
                for layer, pair, found in zip(layers, ranks, angles, strict=True):
                    key = (adapters.tasks[first], adapters.tasks[second], layer, side, width, *pair)
                    rows += [(*key, i, cosine, angle) for i, (cosine, angle) in enumerate(found, start=1)]
    columns_ = ["task_a", "task_b", "layer", "side", "width", "rank_a", "rank_b", "index", "cosine", "angle"]
    return pd.DataFrame(rows, columns=columns_)


def _angles(
    a: Triples, b: Triples, inner: Tensor, side: str, ranks: Sequence[tuple[int, int]]
) -> Iterator[list[tuple[float, float]]]:
    """(cosine, angle) of every layer. Sines, which need the long frames, only where an angle is below π/4."""
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    angles = cosines.acos()
    for place in (cosines > 0.5**0.5).any(-1).nonzero().flatten().tolist():
        small, large = (a, b) if ranks[place][0] <= ranks[place][1] else (b, a)
        x, y = (update.frames(place)[side == "input"] for update in (small, large))
        x = x[:, : min(ranks[place])]
        sines = torch.linalg.svdvals(x - y @ (y.mT @ x)).flip(-1).clamp(max=1.0)
        exact = angles[place, : len(sines)]
        angles[place, : len(sines)] = torch.where(cosines[place, : len(sines)] > 0.5**0.5, sines.asin(), exact)
    for place, pair in enumerate(ranks):
        count = min(pair)
        yield list(zip(cosines[place, :count].tolist(), angles[place, :count].tolist(), strict=True))


def component_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    protected: Mapping[str, Tensor] | None = None,
    memory: int = MEMORY,
) -> pd.DataFrame:
    """Tidy rank-one components: task, layer, component, sigma, energy_share, backward_share, forward_corruption.

    For component i of task t, ``σ_i u_i v_iᵀ``: ``backward_share`` = ``σ_i² ‖Fᵀv_i‖² / Σ_k σ_k² ‖Fᵀv_k‖²``, its part
    in what leaks into the protected subspace F (NaN where nothing is protected); ``forward_corruption`` =
    ``|u_iᵀ (Σ_{k>t} ΔW_k) v_i| / σ_i``, what all later updates do to it, as a share of itself (NaN for the last).

    Raises:
        ValueError: a basis does not fit its layer, or no protected layer is an adapted one.

    >>> eye = torch.eye(3)
    >>> a = (eye[:, :2] * torch.tensor([2.0, 1.0]), eye[:, :2])
    >>> b = (eye[:, :2] * torch.tensor([0.5, 0.5]), eye[:, :2])
    >>> found = component_table(AdapterSet.from_factors({"a": {"x": a}, "b": {"x": b}}), protected={"x": eye})
    >>> found[found["task"] == "a"][["energy_share", "backward_share", "forward_corruption"]].to_numpy().tolist()
    [[0.8, 0.8, 0.25], [0.2, 0.2, 0.5]]
    """
    protected = bases_by_layer(adapters, protected)
    frames: list[pd.DataFrame] = []
    for layers in layer_batches(adapters, memory=memory):
        lefts, rights = stacked_factors(adapters, layers, device=device, dtype=torch.float64)
        updates = [triples(left, right) for left, right in zip(lefts, rights, strict=True)]
        products: dict[int, list[tuple[Tensor, Tensor, int]]] = {}
        for a, b, outputs, inputs in shared(updates):
            products.setdefault(a, []).append((outputs, inputs, b))
        for number, (task, update) in enumerate(zip(adapters.tasks, updates, strict=True)):
            inside = torch.full_like(update.values, torch.nan)
            if number + 1 < len(updates):
                inside = sum(
                    (outputs * updates[b].values[:, None, :] * inputs).sum(-1)
                    for outputs, inputs, b in products[number]
                )  # type: ignore[assignment]
            for place, layer in enumerate(layers):
                count = int(update.rank[place])
                sigma = update.values[place, :count]
                basis = protected.get(layer) if protected is not None else adapters.protected(task, layer)
                share = torch.full_like(sigma, torch.nan)
                if basis is not None:
                    onto = update.frames(place)[1][:, :count].mT @ basis.to(update.q_right)
                    share = sigma.square() * onto.square().sum(-1)
                    share = share / share.sum()
                columns = {
                    "component": range(1, count + 1),
                    "sigma": sigma.tolist(),
                    "energy_share": (sigma.square() / update.energy[place]).tolist(),
                    "backward_share": share.tolist(),
                    "forward_corruption": (inside[place, :count].abs() / sigma).tolist(),
                }
                frames.append(pd.DataFrame({"task": task, "layer": layer, **columns}))
    table = pd.concat(frames, ignore_index=True)
    tasks, layers_ = ({name: place for place, name in enumerate(names)} for names in (adapters.tasks, adapters.layers))
    order = np.lexsort((table["component"], table["layer"].map(layers_), table["task"].map(tasks)))
    return table.iloc[order].reset_index(drop=True)
