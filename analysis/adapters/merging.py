"""Adapters merged into one: sums of factors, and rules for the entries of the updates."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import Progress
from analysis.numerics.decomposition import triples

Rule = Callable[[str, Tensor], Tensor]
"""Name of a layer and the updates of all tasks (T, m, n) to the merged update (m, n)."""
SMALL = 1024
"""Smaller side up to which a dense update takes a complete SVD; above, the leading part of one."""
EXTRA, ROUNDS = 16, 4
"""Directions beyond the rank, and power iterations, of the leading part of an SVD (halko2011finding, section 4)."""


@dataclass(frozen=True, eq=False)
class MergedAdapters:
    """The results of several rules: `adapters` has one task per rule."""

    adapters: AdapterSet
    kept: pd.DataFrame
    """rule, layer, rank, kept: the share of the merged update's energy that its rank keeps; NaN for a zero update."""


def merged(
    adapters: AdapterSet,
    rules: Mapping[str, Mapping[str, float] | Rule],
    *,
    rank: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> MergedAdapters:
    """One update per rule from the updates of all tasks; saving its `adapters` writes LoRA folders that PEFT loads.

    A rule is a weight per task, or a function of a layer's updates. Weighted sums are exact: their factors stand side
    by side. Functions take the dense updates of one layer at a time, and the result is truncated to the sum of the
    tasks' ranks. Such rules mix entries, so the truncation loses energy: `kept` states how much is left.

    Args:
        adapters: the updates; all tasks adapt the same model.
        rules: name of the result to task to weight, or to a function (layer, updates (T, m, n)) to (m, n).
        rank: highest rank of every result.
        device: where dense updates are computed; one layer of all tasks must fit.
        progress: called with the number of finished layers and of all layers.

    Raises:
        ValueError: there is no rule; a weight is missing, unknown or not finite; all weights are zero; the rank is
            below 1; or a function returns another shape or NaN.

    >>> eye = torch.eye(3)
    >>> two = AdapterSet.from_factors({t: {"x": (eye[:, [k]], eye[:, [k]])} for k, t in enumerate("ab")})
    >>> both = merged(two, {"sum": {"a": 1.0, "b": 1.0}, "largest": lambda layer, updates: updates.amax(0)})
    >>> [float((left @ right.mT).trace()) for _, _, left, right in both.adapters]
    [2.0, 2.0]
    >>> both.kept["kept"].tolist()
    [1.0, 1.0]
    """
    _validate(adapters, rules, rank)
    held: dict[str, dict[str, tuple[Tensor, Tensor]]] = {name: {} for name in rules}
    rows = []
    functions = {name: rule for name, rule in rules.items() if not isinstance(rule, Mapping)}
    for done, (layer, factors) in enumerate(_by_layer(adapters), start=1):
        total = sum(left.shape[1] for left, _ in factors.values())
        sides = [side.shape[0] for side in factors[adapters.tasks[0]]]
        most = min(total, *sides, total if rank is None else rank)
        updates = _dense(factors, device) if functions else None
        for name, rule in rules.items():
            if isinstance(rule, Mapping):
                left, right, kept = _sum(factors, rule, most)
            else:
                assert updates is not None  # there is a function
                left, right, kept = _truncated(_applied(name, rule, layer, updates), most)
            held[name][layer] = (left.cpu(), right.cpu())
            rows.append((name, layer, left.shape[1], kept))
        if progress is not None:
            progress(done, len(adapters.layers))
    kinds: Any = {"transposed": adapters.transposed, "embeddings": adapters.embeddings, "tied": adapters.tied}
    kinds |= {"parameters": adapters.parameters, "kernels": adapters.kernels}
    table = pd.DataFrame(rows, columns=["rule", "layer", "rank", "kept"])
    table = table.sort_values("rule", key=lambda rule: rule.map(list(rules).index), kind="stable", ignore_index=True)
    return MergedAdapters(AdapterSet.from_factors(held, **kinds), table)


def _validate(adapters: AdapterSet, rules: Mapping[str, Mapping[str, float] | Rule], rank: int | None) -> None:
    if not rules:
        raise ValueError("merged needs at least one rule")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, at least 1 was expected")
    for name, weights in rules.items():
        if not isinstance(weights, Mapping):
            continue
        if differing := sorted(set(weights) ^ set(adapters.tasks)):
            tasks = ", ".join(adapters.tasks)
            raise ValueError(f"{name}: {differing[0]!r} has no weight or is no task; weights are for {tasks}")
        if not all(map(math.isfinite, weights.values())) or not any(weights.values()):
            raise ValueError(f"{name}: weights are {dict(weights)}, finite numbers that are not all zero were expected")


def _by_layer(adapters: AdapterSet) -> Iterator[tuple[str, dict[str, tuple[Tensor, Tensor]]]]:
    """Layer, and task to its factors, from one pass over every file."""
    readers = {task: adapters.read(task, adapters.layers) for task in adapters.tasks}
    for layer in adapters.layers:
        yield layer, {task: next(reader)[2:] for task, reader in readers.items()}


def _dense(factors: Mapping[str, tuple[Tensor, Tensor]], device: torch.device | str) -> Tensor:
    return torch.stack([left.to(device) @ right.to(device).mT for left, right in factors.values()])


def _sum(
    factors: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, float], most: int
) -> tuple[Tensor, Tensor, float]:
    """Factors of the weighted sum, and the share of energy kept; exact where `most` is not below the sum's rank."""
    used = {task: weight for task, weight in weights.items() if weight}
    left = torch.cat([weight * factors[task][0] for task, weight in used.items()], dim=1)
    right = torch.cat([factors[task][1] for task in used], dim=1)
    if left.shape[1] <= most:
        return left, right, 1.0 if left.any() and right.any() else float("nan")
    both = triples(left.double()[None], right.double()[None])
    energy = both.values[0].square()
    kept = (energy[:most].sum() / energy.sum()).item()  # NaN where tasks cancel
    values = both.values[0, :most]
    return (both.left[0, :, :most] * values).float(), both.right[0, :, :most].float(), kept


def _applied(name: str, rule: Rule, layer: str, updates: Tensor) -> Tensor:
    result = rule(layer, updates)
    if result.shape != updates.shape[1:] or not torch.isfinite(result).all():
        shape = tuple(updates.shape[1:])
        raise ValueError(f"{name}, {layer}: the rule returned NaN or shape {tuple(result.shape)}, not {shape}")
    return result


def _truncated(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors of the leading part of a dense update, and its share of the energy."""
    energy = update.double().square().sum().item()
    if min(update.shape) <= SMALL:
        u, values, vt = torch.linalg.svd(update.double(), full_matrices=False)
        v = vt.mT
    else:
        devices = [update.device] if update.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # Not torch.manual_seed, which would seed all other devices of the process too, for good.
            drawn_from = torch.cuda.default_generators[update.device.index] if devices else torch.default_generator
            drawn_from.manual_seed(0)
            u, values, v = torch.svd_lowrank(update, q=min(rank + EXTRA, *update.shape), niter=ROUNDS)
    values = values[:rank]
    kept = values.double().square().sum().item() / energy if energy else float("nan")
    return (u[:, :rank] * values).float(), v[:, :rank].float().contiguous(), kept


def together(adapters: AdapterSet, merged: AdapterSet) -> AdapterSet:
    """One set with the updates of the tasks, and then those of the rules under the names ``"merged: RULE"``."""
    renamed = tuple(replace(source, task=f"merged: {source.task}") for source in merged.sources)
    sources = (*adapters.sources, *renamed)
    return AdapterSet(sources, (None,) * len(sources), adapters.notices)
