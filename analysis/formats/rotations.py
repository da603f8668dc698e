"""Rotations of the base weight's inputs or outputs, ``ΔW = W Rᵀ − W`` or ``ΔW = R W − W``: OFT, BOFT, HRA, RoAd."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats.structured import Factors, Stored, StructuredLayer, Tensors, full, sizes, unequal


@dataclass(frozen=True)
class OftOptions:
    """Options of PEFT's OFT that change the rotation."""

    terms: int | None = None
    """Number of terms of the Neumann series in place of the inverse; None for the exact Cayley transform."""
    bound: float | None = None
    """Bound on each block's norm times the square root of the number of blocks (constrained OFT); None for no bound."""
    shared: bool = False
    """Whether all blocks of a layer share one rotation."""
    outputs: bool = False
    """Whether the outputs are rotated, as for embeddings."""


def oft(
    path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int], options: OftOptions
) -> StructuredLayer:
    """PEFT's OFT: block-diagonal R, the Cayley transforms of skew matrices whose upper triangles are stored."""
    blocks, elements = sizes(path, stored, parts["rotation"], 2)
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    rotated = shape[0] if options.outputs else shape[1]
    fits = size * (size - 1) // 2 == elements
    if not fits or (blocks != 1 if options.shared else blocks * size != rotated) or rotated % size:
        raise unequal(path, f"the shape of {parts['rotation']}", (blocks, elements), f"a rotation of R^{rotated}")
    return StructuredLayer(parts, (*shape, min(shape)), partial(_oft_factors, options, size), relative=True)


def _oft_factors(options: OftOptions, size: int, tensors: Tensors, weight: Tensor) -> Factors:
    upper = tensors["rotation"]
    skew = upper.new_zeros(len(upper), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = upper
    skew = skew - skew.mT
    if options.bound is not None:
        norms = torch.linalg.matrix_norm(skew, keepdim=True)
        bound = options.bound / math.sqrt(len(upper))
        skew = torch.where(norms <= bound, skew, skew * (bound / norms))
    blocks = _cayley(-skew) if options.terms is None else _neumann(skew, options.terms)
    if options.shared:
        blocks = blocks.expand((len(weight) if options.outputs else weight.shape[1]) // size, size, size)
    return full(_blockwise(blocks.mT, weight) if options.outputs else _blockwise(blocks, weight.mT).mT)


def _cayley(skew: Tensor) -> Tensor:
    """The rotations ``(I + Q)(I − Q)⁻¹`` of skew matrices Q."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    rotation: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return rotation


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series for the Cayley transform, ``I + 2Q + 2Q² + ... + 2Qᵏ⁻² + Qᵏ⁻¹``, which is a rotation nearly."""
    rotation = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    if terms > 1:
        rotation += 2 * skew
    if terms > 2:
        power = skew @ skew
        rotation += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            rotation += 2 * power
        rotation += power @ skew
    return rotation


def _applied(blocks: Tensor, x: Tensor) -> Tensor:
    """``B x`` for the block-diagonal B of these blocks (k, b, b)."""
    product: Tensor = blocks @ x.reshape(*blocks.shape[:2], -1)
    return product.flatten(0, 1)


def _blockwise(blocks: Tensor, x: Tensor) -> Tensor:
    """``R x − x`` for the block-diagonal R of these blocks (k, b, b)."""
    change = blocks - torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return _applied(change, x)


def _permuted(blocks: Tensor, order: Tensor, x: Tensor) -> Tensor:
    """The block-diagonal product of rows in another order: ``y[order] = B x[order]``."""
    y = torch.empty_like(x)
    y[order] = _applied(blocks, x[order])
    return y


def boft(path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int]) -> StructuredLayer:
    """PEFT's BOFT: ``diag(s) W Rᵀ − W`` with R a product of block-diagonal rotations of interleaved coordinates."""
    stages, blocks, size, columns = sizes(path, stored, parts["rotation"], 4)
    interleaved = stages == 1 or (size % 2 == 0 and blocks % 2 ** (stages - 1) == 0)
    if blocks * size != shape[1] or size != columns or not interleaved:
        found = (stages, blocks, size, columns)
        raise unequal(path, f"the shape of {parts['rotation']}", found, f"a rotation of R^{shape[1]}")
    if math.prod(stored[parts["scale"]]) != shape[0]:
        raise unequal(path, f"the shape of {parts['scale']}", stored[parts["scale"]], (shape[0], 1))
    return StructuredLayer(parts, (*shape, min(shape)), _boft_factors, relative=True)


def _boft_factors(tensors: Tensors, weight: Tensor) -> Factors:
    raw = tensors["rotation"]
    rotations = _cayley((raw.mT - raw) / 2)
    stages, blocks, size, _ = raw.shape
    rotated = weight.mT
    indices = torch.arange(weight.shape[1])
    for stage in range(stages):
        halves = indices.view(blocks // 2**stage, -1, size // 2) if stage else indices.view(1, 1, -1)
        order = torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten()
        rotated = _permuted(rotations[stage], order.argsort(), rotated)
    return full(rotated.mT * tensors["scale"].reshape(-1, 1) - weight)


def diagonal_oft(path: Path, stored: Stored, parts: Mapping[str, str], m: int, constraint: float) -> None:
    """Accept LyCORIS' ``oft_blocks`` for m outputs; ValueError otherwise."""
    shape = stored[parts["blocks"]]
    dims = 4 if len(shape) == 4 else 3
    *stages, blocks, size, columns = sizes(path, stored, parts["blocks"], dims)
    butterfly = not stages or (size % 2 == 0 and m % (2 ** (stages[0]) * (size // 2)) == 0)
    if blocks * size != m or size != columns or not butterfly:
        raise unequal(path, f"the shape of {parts['blocks']}", shape, f"a rotation of R^{m}")
    if "rescale" in parts and math.prod(stored[parts["rescale"]]) != m:
        raise unequal(path, f"the shape of {parts['rescale']}", stored[parts["rescale"]], (m, 1))
    if not constraint >= 0:
        raise unequal(path, f"alpha beside {parts['blocks']}", constraint, "a bound of at least 0")


def lycoris_oft(
    path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int], constraint: float
) -> StructuredLayer:
    """LyCORIS' diagonal OFT and BOFT: rotated and rescaled outputs, ``diag(s) R W − W``.

    The norm of all skew matrices of a layer is at most `constraint` times m; 0 stands for no bound.
    """
    diagonal_oft(path, stored, parts, shape[0], constraint)
    rule = partial(_lycoris_factors, constraint * shape[0])
    return StructuredLayer(parts, (*shape, min(shape)), rule, relative=True)


def _lycoris_factors(bound: float, tensors: Tensors, weight: Tensor) -> Factors:
    skew = tensors["blocks"] - tensors["blocks"].mT
    norm = torch.linalg.vector_norm(skew) + 1e-8  # as LyCORIS adds it
    if bound > 0 and norm > bound:
        skew = skew * (bound / norm)
    rotations = _cayley(skew)
    if rotations.ndim == 3:
        rotated = weight + _blockwise(rotations.mT, weight)
    else:
        rotated, size = weight, rotations.shape[-1]
        for stage, blocks in enumerate(rotations):
            order = torch.arange(len(weight)).view(-1, 2, 2**stage * (size // 2)).mT.flatten()
            rotated = _permuted(blocks, order, rotated)
    if "rescale" in tensors:
        rotated = rotated * tensors["rescale"].reshape(-1, 1)
    return full(rotated - weight)


def householder(
    path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int], orthogonal: bool
) -> StructuredLayer:
    """HRA's update ``W H₁ ⋯ H_r − W`` with reflections ``H = I − 2uuᵀ``, of rank r, as factors ``−W Y`` and U.

    With `orthogonal`, the directions are made orthonormal first, as HRA does if ``apply_GS`` is set.
    """
    n, r = sizes(path, stored, parts["u"], 2)
    if n != shape[1] or r > n:
        raise unequal(path, f"the shape of {parts['u']}", (n, r), f"at most {shape[1]} directions in R^{shape[1]}")
    return StructuredLayer(parts, (*shape, r), partial(_householder_factors, orthogonal), relative=True)


def _householder_factors(orthogonal: bool, tensors: Tensors, weight: Tensor) -> Factors:
    u = tensors["u"]
    if orthogonal:
        basis = torch.linalg.qr(u)[0]
        return -2 * (weight @ basis), basis
    u = u / torch.linalg.vector_norm(u, dim=0)
    y = torch.zeros_like(u)
    for i in range(u.shape[1]):  # with H₁ ⋯ Hᵢ = I − Y Uᵀ, the next column of Y is 2 H₁ ⋯ Hᵢ u
        y[:, i] = 2 * (u[:, i] - y[:, :i] @ (u[:, :i].mT @ u[:, i]))
    return -(weight @ y), u


def road(
    path: Path, stored: Stored, parts: Mapping[str, str], shape: tuple[int, int], variant: str, group: int
) -> StructuredLayer:
    """RoAd's update ``R W − W``: pairs of outputs, half a group apart, are rotated by θ and scaled by α."""
    m = shape[0]
    counts = {"road_1": m // 2, "road_2": m, "road_4": 2 * m}
    expected = counts.get(variant)
    found = {stored[parts[part]] for part in ("theta", "alpha")}
    if found != {(expected,)} or group < 2 or group % 2 or m % group:
        what = f"the shapes of {parts['theta']} and {parts['alpha']}"
        raise unequal(path, what, sorted(found), f"{expected} numbers of variant {variant!r}, group {group}")
    return StructuredLayer(parts, (*shape, min(shape)), partial(_road_factors, variant, group), relative=True)


def _road_factors(variant: str, group: int, tensors: Tensors, weight: Tensor) -> Factors:
    theta, alpha = tensors["theta"], tensors["alpha"]
    if variant == "road_1":
        theta, alpha = (x.view(-1, group // 2).repeat_interleave(2, dim=0).flatten() for x in (theta, alpha))
    if variant == "road_4":
        (t1, t2), (a1, a2) = (x.view(-1, 2, group).unbind(1) for x in (theta, alpha))
        same, other = (a1 * t1.cos()).flatten(), (a2 * t2.sin()).flatten()
    else:
        same, other = alpha * theta.cos(), alpha * theta.sin()
    first, second = weight.reshape(-1, 2, group // 2, weight.shape[1]).unbind(1)
    turned = torch.stack([-second, first], dim=1).flatten(0, 2)
    return full(weight * (same - 1)[:, None] + turned * other[:, None])
