"""Changed adapters for causal tests: random directions at the same spectrum, or other sizes in the same directions."""

import math
import zlib
from typing import Literal

import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.interventions import changed_set, changed_triples
from analysis.numerics.decomposition import Triples, triples


def redirected(adapters: AdapterSet, *, side: Literal["input", "output", "both"] = "both", seed: int = 0) -> AdapterSet:
    """Updates with random orthonormal directions, uniform on one side or both; singular values stay.

    The control for the shape of a spectrum: what an update of this spectrum does that learned nothing. A draw depends
    on `seed`, the layer's name and the side.

    Raises:
        ValueError: an unknown side, or an update is zero.

    >>> eye = torch.eye(3)
    >>> start = AdapterSet.from_factors({"a": {"x": (eye[:, :2] * torch.tensor([4.0, 3.0]), eye[:, :2])}})
    >>> left, right = redirected(start, side="input").factors("a", "x")
    >>> left[:2].tolist(), (right.T @ right).round(decimals=5).abs().tolist()
    ([[4.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]])
    """
    if side not in ("input", "output", "both"):
        raise ValueError(f"side is {side!r}, choose 'input', 'output' or 'both'")

    def change(layer: str, update: Triples) -> tuple[Tensor, Tensor]:
        rank = int(update.rank[0])
        left, right = update.left[0, :, :rank], update.right[0, :, :rank]
        if side != "input":
            left = _random_frame(left, f"{seed} {layer} output")
        if side != "output":
            right = _random_frame(right, f"{seed} {layer} input")
        return left * update.values[0, :rank], right

    return changed_triples(adapters, change)


def scaled(adapters: AdapterSet, factor: float) -> AdapterSet:
    """Updates times a positive factor: shape and directions stay, every norm changes by the factor.

    Raises:
        ValueError: factor is not positive and finite.

    >>> start = AdapterSet.from_factors({"a": {"x": (torch.ones(2, 1), torch.ones(3, 1))}})
    >>> scaled(start, 0.5).factors("a", "x")[0].tolist()
    [[0.5], [0.5]]
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor is {factor}, a positive number was expected")
    return changed_set(adapters, lambda task, layer, left, right: (factor * left, right))


def levelled(adapters: AdapterSet, gamma: float = 1.0) -> AdapterSet:
    """Updates whose Frobenius norms n differ less between layers, ``n ← c n^(1−γ)``, with each task's total norm kept.

    γ = 1 gives every layer the same norm, 0 changes nothing. Shapes and directions stay. A spectrum that is flat within
    each layer says nothing about the balance between layers.

    Raises:
        ValueError: gamma is outside [0, 1], or an update is zero.

    >>> def one(norm): return norm * torch.ones(1, 1), torch.ones(1, 1)
    >>> start = AdapterSet.from_factors({"a": {"x": one(7.0), "y": one(1.0)}})
    >>> [left.item() for _, _, left, _ in levelled(start)]  # 7² + 1² = 2 · 5²
    [5.0, 5.0]
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}, a number from 0 to 1 was expected")
    norms: dict[str, dict[str, float]] = {task: {} for task in adapters.tasks}
    for task, layer, left, right in adapters:
        norms[task][layer] = float(triples(left.double()[None], right.double()[None]).energy[0].sqrt())
        if norms[task][layer] == 0:
            raise ValueError(f"{task}, {layer}: the update is zero, no factor brings it to another norm")
    totals = {
        task: math.hypot(*own.values()) / math.hypot(*(norm ** (1 - gamma) for norm in own.values()))
        for task, own in norms.items()
    }

    def change(task: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return totals[task] * norms[task][layer] ** -gamma * left, right

    return changed_set(adapters, change)


def _random_frame(like: Tensor, purpose: str) -> Tensor:
    """A uniformly random orthonormal matrix of this shape and precision."""
    draw = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
    normal = torch.randn(like.shape, generator=draw, dtype=like.dtype)
    q, r = torch.linalg.qr(normal)
    frame: Tensor = q * r.diagonal().sign()  # uniform: the signs of R depend on the algorithm
    return frame
