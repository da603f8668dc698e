"""Updates that scale fixed matrices: the base weight (IA3, HiRA, DoRA) or factors (VeRA, RandLora, DeLoRA, AdaLoRA)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats.structured import Factors, Rule, Stored, StructuredLayer, Tensors, full, needed, sizes, unequal

FLOOR = 1e-4
"""Smallest norm by which DeLoRA divides."""


def scaled_weight(
    path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int], *, inputs: bool, start: float
) -> StructuredLayer:
    """IA3's update ``diag(l − c) W``, or ``W diag(l − c)`` for scaled inputs; c is 1, or 0 if l starts at zero.

    Each number of an input scales all positions of a kernel.
    """
    count = math.prod(stored[parts["scale"]])
    side = shape[1] if inputs else shape[0]
    if not count or side % count or (not inputs and side != count):
        raise unequal(path, f"the number of scales in {parts['scale']}", count, f"one per side of {shape}")
    rule = partial(_scaled_factors, inputs, start)
    return StructuredLayer(parts, (*shape, min(shape)), rule, relative=True)


def _scaled_factors(inputs: bool, start: float, tensors: Tensors, weight: Tensor) -> Factors:
    scale = tensors["scale"].flatten() - start
    if not inputs:
        return full(weight * scale[:, None])
    return full(weight * scale.repeat_interleave(weight.shape[1] // len(scale)))


def hira(path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int]) -> StructuredLayer:
    """HiRA's update ``W ∘ (B A)``."""
    _product(path, stored, parts, shape)
    return StructuredLayer(parts, (*shape, min(shape)), _hira_factors, relative=True)


def _product(path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int] | None = None) -> None:
    """Accept factors B (m, r) and A (r, n); ValueError otherwise."""
    needed(path, parts, "a", "b")
    (m, r), (rank, n) = sizes(path, stored, parts["b"], 2), sizes(path, stored, parts["a"], 2)
    if r != rank:
        raise unequal(path, f"the rank of {parts['b']} and {parts['a']}", (r, rank), "one number")
    if shape is not None and (m, n) != shape:
        raise unequal(path, f"the shape of {parts['b']} times {parts['a']}", (m, n), shape)


def _hira_factors(tensors: Tensors, weight: Tensor) -> Factors:
    return full(weight * (tensors["b"] @ tensors["a"]))


def vera(path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int]) -> StructuredLayer:
    """VeRA's update ``diag(b) B diag(d) A`` with leading rows of B and columns of A, which all layers share."""
    (r, inputs), (outputs, rank) = sizes(path, stored, parts["a"], 2), sizes(path, stored, parts["b"], 2)
    (m,), (count,) = sizes(path, stored, parts["scale_b"], 1), sizes(path, stored, parts["scale_d"], 1)
    if not (m == shape[0] <= outputs and shape[1] <= inputs and count == r == rank):
        found = f"{parts['scale_b']} ({m},), {parts['scale_d']} ({count},), A {(r, inputs)}, B {(outputs, rank)}"
        raise unequal(path, f"the shape of {found}", "too small", f"factors of a matrix {shape}")
    return StructuredLayer(parts, (*shape, r), partial(_vera_factors, shape[1]))


def _vera_factors(n: int, tensors: Tensors, weight: Tensor) -> Factors:
    rows = tensors["scale_b"]
    return rows[:, None] * tensors["b"][: len(rows)] * tensors["scale_d"], tensors["a"][:, :n].mT


def randlora(
    path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int], scaling: float
) -> StructuredLayer:
    """RandLora's update, a sum of products of random factors that all layers share, with trained scales; full rank.

    The factor of the smaller side is scaled: by ``lambda`` (r, k) for each of k bases, and by ``gamma`` (k, side).
    """
    (r, one, small), (large, count, rank) = (sizes(path, stored, parts[part], 3) for part in "ab")
    (rows, bases), (of_gamma, side) = (sizes(path, stored, parts[part], 2) for part in ("lambda", "gamma"))
    fits = one == 1 and rows == r == rank and bases == of_gamma <= count
    if not fits or side != min(shape) or side > small or max(shape) > large:
        found = {parts[part]: stored[parts[part]] for part in ("a", "b", "lambda", "gamma")}
        raise unequal(path, "the shape of RandLora's tensors", found, f"factors of a matrix {shape}")
    return StructuredLayer(parts, (*shape, min(shape)), partial(_randlora_factors, scaling, shape))


def _randlora_factors(scaling: float, shape: tuple[int, int], tensors: Tensors, weight: Tensor) -> Factors:
    gamma = tensors["gamma"]
    bases, side = gamma.shape
    small = (tensors["lambda"][:, :, None] * tensors["a"][:, :, :side] * gamma).flatten(0, 1)
    large = tensors["b"][: max(shape), :bases].flatten(1)
    change = large @ small * scaling  # PEFT's order of the bases: by rank in one factor, by base in the other
    return full(change if side == shape[1] else change.mT)


def adalora(path: Path, stored: Stored, parts: Mapping[str, str], scaling: float) -> StructuredLayer:
    """AdaLoRA's update ``s B diag(E) A``."""
    needed(path, parts, "a", "b", "e")
    _product(path, stored, parts)
    (m, r), n = stored[parts["b"]], stored[parts["a"]][1]
    if math.prod(stored[parts["e"]]) != r:
        raise unequal(path, f"the shape of {parts['e']}", stored[parts["e"]], (r, 1))
    return StructuredLayer(parts, (m, n, r), partial(_adalora_factors, scaling))


def _adalora_factors(scaling: float, tensors: Tensors, weight: Tensor) -> Factors:
    return tensors["b"] * tensors["e"].flatten() * scaling, tensors["a"].mT


def delora(path: Path, stored: Stored, parts: Mapping[str, str]) -> StructuredLayer:
    """DeLoRA's update ``(λ / r) B diag(1 / ‖bᵢ‖‖aᵢ‖) A diag(w)``; w holds the norms of the base weight's columns."""
    needed(path, parts, "a", "b", "lambda", "norms")
    _product(path, stored, parts)
    (m, r), n = stored[parts["b"]], stored[parts["a"]][1]
    for part, count in (("lambda", 1), ("norms", n)):
        if math.prod(stored[parts[part]]) != count:
            raise unequal(path, f"the shape of {parts[part]}", stored[parts[part]], (count,))
    return StructuredLayer(parts, (m, n, r), _delora_factors)


def _delora_factors(tensors: Tensors, weight: Tensor) -> Factors:
    a, b = tensors["a"], tensors["b"]
    norms = torch.linalg.vector_norm(a, dim=1).clamp(min=FLOOR) * torch.linalg.vector_norm(b, dim=0).clamp(min=FLOOR)
    return b * (tensors["lambda"] / len(a) / norms), a.mT * tensors["norms"].reshape(-1, 1)


def decomposed(layer: StructuredLayer, scale: str, stored: Stored, path: Path) -> StructuredLayer:
    """The update ``diag(d / ‖W + ΔW‖) (W + ΔW) − W`` of a layer with LyCORIS' ``dora_scale`` d, of full rank.

    A scale (m, 1, ...) goes with the norms of rows, and (1, k, ...) with those of inputs over all positions.
    """
    m, n, _ = layer.shape
    shape = stored[scale]
    count = math.prod(shape)
    rows = len(shape) >= 2 and shape[0] == count == m
    columns = len(shape) >= 2 and shape[0] == 1 and shape[1] == count and count > 0 and n % count == 0
    if not rows and not columns:
        raise unequal(path, f"the shape of {scale}", shape, f"({m}, 1) or (1, inputs)")
    rule = partial(_decomposed_factors, layer.rule, rows)
    return replace(
        layer,
        parts={**layer.parts, "dora_scale": scale},
        shape=(m, n, min(m, n)),
        rule=rule,
        relative=True,
        leading=None,
    )


def _decomposed_factors(rule: Rule, rows: bool, tensors: Tensors, weight: Tensor) -> Factors:
    left, right = rule(tensors, weight)
    changed, scale = weight + left @ right.mT, tensors["dora_scale"].flatten()
    epsilon = torch.finfo(torch.float32).eps  # as LyCORIS adds it in single precision
    if rows:
        return full(changed * (scale / (torch.linalg.vector_norm(changed, dim=1) + epsilon))[:, None] - weight)
    kernels = changed.reshape(len(changed), len(scale), -1)
    factor = scale / (torch.linalg.vector_norm(kernels, dim=(0, 2)) + epsilon)
    return full((kernels * factor[:, None]).flatten(1) - weight)
