"""The state of a model's adapters: figures while they train, and frames put back on their manifolds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifold_cl.adapters.eblora import EBLoRALinear, Protected
from manifold_cl.adapters.frames import Points, points_of, validate_frames
from manifold_cl.adapters.layers import named_layers, shells
from manifold_cl.adapters.low_rank import spectral_entropy
from manifold_cl.adapters.named_adapters import NamedAdapters
from manifold_cl.geometry import RestrictedStiefel


def geometry_metrics(model: nn.Module, *, prefix: str = "geometry/") -> dict[str, float]:
    """Plain numbers for a logger, over the adapters that train: constraint errors, entropy, capacity, magnitude.

    ``orthonormality`` and ``protection`` are the largest entries of xᵀx − I and Fᵀx over all frames, NaN if one is;
    ``spectral_entropy`` is the mean of ``−Σ p log p / log r``, p = σ² / Σσ², over layers, in [0, 1] (1 by
    construction for a scalar core); ``capacity`` is the least share of a frame's free directions that could still be
    protected, in [0, 1]; ``scale`` is the mean of the largest ``|s|``. O(n r (k + r)) a frame, in float64.

    Works for `EBLoRALinear` and for the PEFT tuner, wrapped by any engine that keeps modules whole.

    Raises:
        ValueError: for a model without such adapters.
    """
    errors, shares, entropies, sizes = [], [], [], []
    for module in _balanced(model):
        scales = [scale.detach() for _, scale in module.scale_parameters()]
        for _, frame, manifold in module.manifold_parameters():
            errors.append(manifold.constraint_error(frame))
            shares.append(_capacity(manifold, *frame.shape))
        # A scalar core has one number for all r values, and entropy 1 whatever r is.
        entropies += [spectral_entropy(scale, max(scale.shape, default=1)) for scale in scales]
        sizes += [float(scale.abs().max()) for scale in scales]
    if not errors:
        raise ValueError("the model has no balanced adapters: inject EBLoRALinear, or get_peft_model with EBLoraConfig")
    known = [entropy for entropy in entropies if not math.isnan(entropy)]
    return {
        f"{prefix}orthonormality": float(np.max([error.orthonormality for error in errors])),
        f"{prefix}protection": float(np.max([error.protection for error in errors])),
        f"{prefix}spectral_entropy": sum(known) / len(known) if known else math.nan,
        f"{prefix}capacity": min(shares),
        f"{prefix}scale": sum(sizes) / len(sizes),
    }


def validate_on_manifolds(model: nn.Module, *, to: str) -> None:
    """Refuse a model whose frames are off their manifolds by more than 1e-3.

    Args:
        model: with adapters.
        to: what the adapters are wanted for, for the message.

    Raises:
        ValueError: naming the frame that is farthest off, and the remedy.
    """
    validate_frames(_points(model), to=to)


@torch.no_grad()
def retract_adapters(model: nn.Module) -> float:
    """Replace every frame by the nearest point of its manifold; returns the largest constraint error before.

    For models whose weights were averaged (EMA, SWA, Lookahead): an average of orthonormal frames is not orthonormal.
    Frames that are on their manifolds move by rounding only. Inactive adapters of PEFT models are included.

    Raises:
        ValueError: for a frame without a nearest point, as an average of opposite frames, or with NaN. Nothing is
            changed then.
    """
    moved, largest = [], 0.0
    for name, frame, manifold in _points(model):
        error = max(manifold.constraint_error(frame))
        largest = max(largest, error)
        try:
            moved.append((frame, manifold.projx(frame)))
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    if not moved:
        raise ValueError("the model has no balanced adapters: inject EBLoRALinear, or get_peft_model with EBLoraConfig")
    for frame, point in moved:
        frame.copy_(point)
    return largest


def _points(model: nn.Module) -> Points:
    """The frames of all adapters, inactive ones included, under their names in the model."""
    for name, module in model.named_modules():
        found: list[Any] = []
        if isinstance(module, NamedAdapters):
            found = [point for adapter in module.eblora_left for point in module.points(adapter)]
        elif isinstance(module, EBLoRALinear):
            found = list(points_of(module))
        yield from ((f"{name}.{key}", frame, manifold) for key, frame, manifold in found)


def _balanced(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, EBLoRALinear) or (isinstance(module, NamedAdapters) and module.acting()):
            yield module


def _capacity(manifold: RestrictedStiefel, n: int, p: int) -> float:
    return manifold.capacity(p, n) / (n - p) if n > p else 0.0


def eblora_layers(model: nn.Module) -> dict[str, NamedAdapters]:
    """The tuner's layers, by the name of the module they replaced in the base model, compiled or not."""
    found = ((name, part) for name, layer in named_layers(model).items() for part in shells(layer))
    return {name: part for name, part in found if isinstance(part, NamedAdapters)}


def protect(
    model: nn.Module, memory: Mapping[str, Protected] | None = None, *,
    output_memory: Mapping[str, Protected] | None = None, adapter: str | None = None, strict: bool = True,
) -> None:  # fmt: skip
    """Keep an adapter off protected subspaces, such as a `SubspaceMemory`, by name of module in the base model.

    An optimizer that exists already steps on the new manifolds. A side that is not given stays as it is.

    Args:
        model: with the tuner's layers.
        memory: name → protected input subspace; None as a subspace leaves the layer free.
        output_memory: the same for output sides.
        adapter: which one; by default the first active one.
        strict: refuse a memory that lacks adapted layers; otherwise these stay as they are.

    Raises:
        ValueError: for a name that is no adapted layer, for adapted layers without an entry, and where no room is left
            for the rank, with the layer. Nothing is changed then.
    """
    layers = {n: layer for n, layer in eblora_layers(model).items() if (adapter or layer.acting()[:1])
              and (adapter is None or adapter in layer.r)}  # fmt: skip
    given = [mapping for mapping in (memory, output_memory) if mapping is not None]
    if strangers := sorted({name for mapping in given for name in mapping} - layers.keys()):
        raise ValueError(f"no adapted layer {strangers[0]!r}; there are {', '.join(list(layers)[:3])}, …")
    lacking = [name for mapping in given for name in layers if name not in mapping]
    if strict and lacking:
        raise ValueError(
            f"the memory has no entry for {len(lacking)} adapted layers, which would be free: "
            f"{', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}. Grow the memory over all adapted layers, or "
            "pass strict=False"
        )
    prepared = []
    for name, layer in layers.items():
        sides = [
            mapping[name] if mapping is not None and name in mapping else _kept(manifold)
            for mapping, manifold in zip((memory, output_memory), layer.manifolds(adapter or layer.acting()[0])[::-1],
                                         strict=True)
        ]  # fmt: skip
        if not any(name in mapping for mapping in given):
            continue
        try:
            prepared.append(layer.prepared_protection(*sides, adapter=adapter))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for carry_out in prepared:
        carry_out()


def _kept(manifold: RestrictedStiefel) -> Tensor | None:
    """The subspace that a manifold protects, without zero columns."""
    basis = manifold.complement
    return None if basis is None or not manifold.k else basis[:, basis.detach().abs().sum(0) > 0]
