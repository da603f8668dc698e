"""Changed adapters for causal tests: another spectrum at the same norm, or other directions with the same spectrum.

Each function returns an `AdapterSet` in memory; its ``save`` writes LoRA folders that PEFT loads.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.numerics.decomposition import Triples, triples

Norm = Literal["frobenius", "spectral", "nuclear"]


def flattened(adapters: AdapterSet, gamma: float, *, norm: Norm = "frobenius") -> AdapterSet:
    """The same directions with ``σ_i ← c σ_i^(1−γ)``, c such that the norm of ΔW stays; γ = 1 is a flat spectrum.

    Only directions above the float32 rounding of the largest count.

    Args:
        adapters: the updates.
        gamma: strength, in [0, 1].
        norm: the one that stays: ``"frobenius"``, ``"spectral"`` (the largest σ) or ``"nuclear"`` (the sum of σ).

    Raises:
        ValueError: gamma is outside [0, 1], an unknown norm, or an update is zero.

    >>> eye = torch.eye(3)
    >>> steep = AdapterSet.from_factors({"a": {"x": (eye[:, :2] * torch.tensor([4.0, 3.0]), eye[:, :2])}})
    >>> left, _ = flattened(steep, 1.0).factors("a", "x")
    >>> (left.norm(dim=0) ** 2).tolist()  # 25 / 2 each
    [12.5, 12.5]
    """
    return _reshaped(adapters, 1.0 - _unit(gamma), norm)


def sharpened(adapters: AdapterSet, gamma: float, *, norm: Norm = "frobenius") -> AdapterSet:
    """The same directions with ``σ_i ← c σ_i^(1+γ)``, c such that the norm of ΔW stays; γ = 0 changes nothing.

    Arguments are those of `flattened`.

    Raises:
        ValueError: gamma is outside [0, 1], an unknown norm, or an update is zero.
    """
    return _reshaped(adapters, 1.0 + _unit(gamma), norm)


def rotated_away(adapters: AdapterSet, protected: Mapping[str, Tensor], gamma: float = 1.0) -> AdapterSet:
    """Updates with inputs rotated out of the protected subspaces; spectra and output directions stay.

    Each principal angle θ between the input space and F becomes ``θ + γ (π/2 − θ)``: at γ = 1, ``ΔW F = 0``.
    Layers without a subspace stay as they are.

    Raises:
        ValueError: gamma is outside [0, 1], an update is zero, a basis does not fit its layer, is not
            orthonormal, or leaves too few free directions.
    """
    share = _unit(gamma)
    return _rotated(adapters, protected, lambda angle: angle + share * (torch.pi / 2 - angle))


def rotated_into(adapters: AdapterSet, protected: Mapping[str, Tensor], gamma: float = 1.0) -> AdapterSet:
    """Updates with inputs rotated into the protected subspaces; spectra and output directions stay.

    Each principal angle θ becomes ``(1 − γ) θ``: at γ = 1 the min(k, r) nearest input directions lie in F, and
    the others stay.

    Raises:
        ValueError: gamma is outside [0, 1], an update is zero, or a basis does not fit its layer or is not
            orthonormal.
    """
    share = _unit(gamma)
    return _rotated(adapters, protected, lambda angle: (1 - share) * angle)


def truncated(adapters: AdapterSet, rank: int, *, same_norm: bool = True, norm: Norm = "frobenius") -> AdapterSet:
    """The `rank` leading singular triples of each update, scaled so that the norm of ΔW stays.

    With ``same_norm=False`` they keep their size, and the truncation alone acts. Layers of a lower rank stay. `norm` is
    that of `flattened`.

    Raises:
        ValueError: rank is below 1, an unknown norm, or an update is zero.

    >>> eye = torch.eye(3)
    >>> start = AdapterSet.from_factors({"a": {"x": (eye[:, :2] * torch.tensor([4.0, 3.0]), eye[:, :2])}})
    >>> left, _ = truncated(start, 1).factors("a", "x")
    >>> left.norm(dim=0).round(decimals=4).tolist()  # √(16 + 9)
    [5.0]
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, at least 1 was expected")

    def change(_: str, update: Triples) -> tuple[Tensor, Tensor]:
        kept = min(rank, int(update.rank[0]))
        sigma = update.values[0, :kept]
        if same_norm:
            sigma = sigma * (_size(update.values[0], norm) / _size(sigma, norm))
        return update.left[0, :, :kept] * sigma, update.right[0, :, :kept]

    return changed_triples(adapters, change)


def projected_off(adapters: AdapterSet, protected: Mapping[str, Tensor], gamma: float = 1.0) -> AdapterSet:
    """``ΔW (I − γ F Fᵀ)``: updates with the part on protected inputs reduced; at γ = 1, ``ΔW F = 0``.

    Unlike `rotated_away` this takes energy off the update. Layers without a subspace stay as they are.

    Raises:
        ValueError: gamma is outside [0, 1], or a basis does not fit its layer or is not orthonormal.

    >>> eye = torch.eye(3)
    >>> start = AdapterSet.from_factors({"a": {"x": (2 * eye[:, :1], eye[:, :1] + eye[:, 1:2])}})
    >>> left, right = projected_off(start, {"x": eye[:, 1:2]}).factors("a", "x")
    >>> (left @ right.T)[0].tolist()
    [2.0, 0.0, 0.0]
    """
    share = _unit(gamma)
    _validate_layers(adapters, protected)
    bases = {
        layer: _orthonormal(basis.double(), adapters.shape(adapters.tasks[0], layer)[1], layer)
        for layer, basis in protected.items()
    }

    def change(_: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        basis = bases.get(layer)
        return (left, right) if basis is None else (left, right - share * (basis @ (basis.mT @ right)))

    return changed_set(adapters, change)


def _validate_layers(adapters: AdapterSet, protected: Mapping[str, Tensor]) -> None:
    if unknown := [layer for layer in protected if layer not in adapters.layers]:
        raise ValueError(f"{unknown[0]} is protected, but no layer of the adapters; the first is {adapters.layers[0]}")


def _orthonormal(basis: Tensor, n: int, layer: str) -> Tensor:
    """The basis (n, k), orthonormal to rounding; ValueError if it is not nearly so, or of another shape."""
    if basis.ndim != 2 or basis.shape[0] != n:
        raise ValueError(f"{layer}: the protected basis has shape {tuple(basis.shape)}, ({n}, k) was expected")
    k = basis.shape[1]
    drift = (basis.mT @ basis - torch.eye(k, dtype=basis.dtype)).abs().max().item() if k else 0.0
    if not drift <= 1e-4:  # bases are stored in float32 or half precision; NaN is none
        raise ValueError(f"{layer}: the protected basis is not orthonormal, off by {drift:.1e}: orthonormalise it")
    frame: Tensor = torch.linalg.qr(basis).Q
    return frame


def _unit(gamma: float) -> float:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}, a number from 0 to 1 was expected")
    return float(gamma)


def _size(sigma: Tensor, norm: Norm) -> Tensor:
    """The norm of a matrix with these singular values."""
    orders = {"frobenius": 2.0, "spectral": torch.inf, "nuclear": 1.0}
    if norm not in orders:
        raise ValueError(f"norm is {norm!r}, choose from {', '.join(orders)}")
    size: Tensor = torch.linalg.vector_norm(sigma, orders[norm])
    return size


def _reshaped(adapters: AdapterSet, power: float, norm: Norm) -> AdapterSet:
    def change(_: str, update: Triples) -> tuple[Tensor, Tensor]:
        rank = int(update.rank[0])
        sigma = update.values[0, :rank]
        # relative to the largest: a power of a tiny number would underflow
        new = (sigma / sigma[0]) ** power
        new = new * (_size(update.values[0], norm) / _size(new, norm))
        return update.left[0, :, :rank] * new, update.right[0, :, :rank]

    return changed_triples(adapters, change)


def _rotated(adapters: AdapterSet, protected: Mapping[str, Tensor], turn: Callable[[Tensor], Tensor]) -> AdapterSet:
    _validate_layers(adapters, protected)

    def change(layer: str, update: Triples) -> tuple[Tensor, Tensor]:
        rank = int(update.rank[0])
        left, right = update.left[0, :, :rank] * update.values[0, :rank], update.right[0, :, :rank]
        return left, rotated(right, protected[layer].double(), turn, layer) if layer in protected else right

    return changed_triples(adapters, change)


def rotated(right: Tensor, basis: Tensor, turn: Callable[[Tensor], Tensor], layer: str) -> Tensor:
    """An orthonormal frame (n, r) with its principal angles to a subspace changed, each in its own plane.

    With ``Fᵀ V = Y cos Θ Zᵀ`` the frame is ``(F Y cos Θ + N sin Θ) Zᵀ``; Θ changes, Y, Z and N stay. Where a
    direction of V lies in F, its N is a new direction, orthogonal to both.
    """
    n, r = right.shape
    basis = _orthonormal(basis, n, layer)
    k = basis.shape[1]
    if k == 0:
        return right
    y, cosines, zt = torch.linalg.svd(basis.mT @ right, full_matrices=False)
    cosines = cosines.clamp(max=1.0)
    inside = basis @ y  # (n, min(k, r)), principal directions in F
    along = right @ zt.mT  # (n, min(k, r)), their partners in V
    apart = along - inside * cosines
    sines = torch.linalg.vector_norm(apart, dim=0)
    angles = torch.where(cosines > 0.5**0.5, sines.clamp(max=1.0).asin(), cosines.acos())
    new = turn(angles)
    normal = apart / torch.where(sines > 0, sines, 1.0)
    lost = (sines < 1e-7) & (new > 0)  # float32 rounding of V: no direction of its own is left
    if count := int(lost.sum()):
        occupied, sizes, _ = torch.linalg.svd(torch.cat([basis, right], dim=1), full_matrices=False)
        occupied = occupied[:, sizes > 1e-6]  # float32 rounding of V: what F and V share counts once
        if occupied.shape[1] + count > n:
            raise ValueError(
                f"{layer}: {k} protected directions leave {n - k} of {n}, too few for rank {r}: "
                "protect less, or lower the rank"
            )
        normal[:, lost] = _free_directions(occupied, count)
    moved = inside * new.cos() + normal * new.sin()
    result: Tensor = right + (moved - along) @ zt
    return result


def _free_directions(occupied: Tensor, count: int) -> Tensor:
    """Orthonormal columns orthogonal to those of an orthonormal matrix: the same for the same input."""
    draw = torch.Generator().manual_seed(0)
    free = torch.randn(occupied.shape[0], count, generator=draw, dtype=occupied.dtype)
    for _ in range(2):  # once leaves rounding of the order of the draw, twice leaves none
        free = torch.linalg.qr(free - occupied @ (occupied.mT @ free)).Q
    return free


def changed_triples(adapters: AdapterSet, change: Callable[[str, Triples], tuple[Tensor, Tensor]]) -> AdapterSet:
    """The set with every update replaced by a function of its layer and its singular triples."""

    def factors(task: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        update = triples(left[None], right[None])
        if update.energy[0] == 0:
            raise ValueError(f"{task}, {layer}: the update is zero, there is nothing to change")
        return change(layer, update)

    return changed_set(adapters, factors)


def changed_set(
    adapters: AdapterSet, change: Callable[[str, str, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> AdapterSet:
    """The set in memory with every update replaced by new factors, from (task, layer, left, right) in float64.

    New factors are kept in float32. Kinds of layers, names of base models and notices stay; protected bases do not.
    """
    held: dict[str, dict[str, tuple[Tensor, Tensor]]] = {task: {} for task in adapters.tasks}
    for task, layer, left, right in adapters:
        new_left, new_right = change(task, layer, left.double(), right.double())
        held[task][layer] = (new_left.float().contiguous(), new_right.float().contiguous())
    kinds: Any = {"transposed": adapters.transposed, "embeddings": adapters.embeddings, "tied": adapters.tied}
    kinds |= {"parameters": adapters.parameters, "kernels": adapters.kernels}
    changed = AdapterSet.from_factors(held, **kinds)
    sources = zip(changed.sources, adapters.sources, strict=True)
    named = tuple(replace(source, base=before.base) for source, before in sources)
    return replace(changed, sources=named, notices=adapters.notices, left_out=adapters.left_out)
