"""The geometry of a model's adapters: protected subspaces, figures for a logger, validation and retraction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import nn

from manifold_cl.adapters.frames import FrameLayer, Points, validate_frames
from manifold_cl.adapters.layers import adapter_chain, named_layers
from manifold_cl.adapters.low_rank import spectral_entropy
from manifold_cl.adapters.options import Protected, validate_memory
from manifold_cl.geometry import ProtectedSubspace, RestrictedStiefel
from manifold_cl.lists import listed

NO_ADAPTERS = "the model has no balanced adapters: inject EBLoRALinear, or get_peft_model with EBLoraConfig"


def eblora_layers(model: nn.Module) -> dict[str, FrameLayer]:
    """The layers with EBLoRA adapters, by the name of the module they replaced in the base model.

    Finds `EBLoRALinear` and the layers of the PEFT method, in models that torch.compile or PEFT wraps too.

    >>> from manifold_cl import eblora_adapters, inject_adapters
    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> _ = inject_adapters(model, ["0"], eblora_adapters(rank=2))
    >>> list(eblora_layers(torch.compile(model)))
    ['0']
    """
    parts = ((name, part) for name, layer in named_layers(model).items() for part in adapter_chain(layer))
    return {name: part for name, part in parts if isinstance(part, FrameLayer)}


def protect(
    model: nn.Module,
    memory: Mapping[str, Protected] | None = None,
    *,
    output_memory: Mapping[str, Protected] | None = None,
    adapter: str | None = None,
    strict: bool = True,
) -> None:
    """Protect subspaces, such as a `SubspaceMemory`, from the model's adapters; frames move to the nearest points.

    An existing optimizer steps on the new manifolds. A side that is not given stays as it is.

    Args:
        model: injected, or PEFT's.
        memory: layer name → protected input subspace; None as a subspace leaves the layer free.
        output_memory: the same for output sides.
        adapter: name of the adapter; the first active one if None.
        strict: refuse a memory that lacks adapted layers; otherwise these stay as they are.

    Raises:
        ValueError: for a name that is no adapted layer, for adapted layers without an entry, and where no room is left
            for the rank, with the layer. Nothing is changed then.

    Warns:
        UserWarning: for parameters that train beside the adapters, which nothing protects.

    >>> from manifold_cl import eblora_adapters, inject_adapters
    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> layer = inject_adapters(model, ["0"], eblora_adapters(rank=2))["0"]
    >>> protect(model, {"0": torch.eye(6)[:, :3]})
    >>> layer.right[:3].abs().max().item() < 1e-6
    True
    """
    layers = {
        name: layer
        for name, layer in eblora_layers(model).items()
        if (adapter in layer.adapter_names() if adapter else layer.active())
    }
    if not layers:
        raise ValueError(f"no layer has an adapter {adapter!r}" if adapter and eblora_layers(model) else NO_ADAPTERS)
    given = [mapping for mapping in (memory, output_memory) if mapping is not None]
    if not given:
        raise ValueError("protect has nothing to protect: give memory, output_memory, or both")
    for mapping in given:
        validate_memory("memory", mapping)
    if strangers := sorted({name for mapping in given for name in mapping} - layers.keys()):
        raise ValueError(f"no adapted layer {strangers[0]!r}; there are {listed(layers)}")
    lacking = [name for mapping in given for name in layers if name not in mapping]
    if strict and lacking:
        raise ValueError(
            f"the memory has no entry for {len(lacking)} adapted layers, which would be free: "
            f"{listed(lacking)}. Grow the memory over all adapted layers, or "
            "pass strict=False"
        )
    prepared = []
    for name, layer in layers.items():
        if not any(name in mapping for mapping in given):
            continue
        present = [_protected_by(manifold) for _, _, manifold in layer.points(adapter or layer.active()[0])]
        inputs, outputs = (
            mapping[name] if mapping is not None and name in mapping else basis
            for mapping, basis in zip((memory, output_memory), reversed(present), strict=True)
        )
        try:
            prepared.append(layer.prepare_protection(inputs, outputs, adapter=adapter))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for carry_out in prepared:
        carry_out()
    _warn_of_unprotected(model, layers, adapter)


def _warn_of_unprotected(model: nn.Module, layers: Mapping[str, FrameLayer], adapter: str | None) -> None:
    """Warn of parameters that train beside protected adapters, such as PEFT's ``modules_to_save``."""
    points = (point for layer in layers.values() for point in layer.points(adapter or layer.active()[0]))
    if not any(manifold.width for _, _, manifold in points):
        return
    protected = {id(p) for layer in layers.values() for p in cast(nn.Module, layer).parameters()}
    if beside := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in protected]:
        warnings.warn(
            f"{len(beside)} parameters train without protection, such as {beside[0]}: later tasks change them, and the "
            "answers to earlier tasks with them. Freeze them with requires_grad_(False) (PEFT's task_type and "
            "modules_to_save make a head train), or keep a copy per task",
            UserWarning,
            stacklevel=3,
        )


def geometry_metrics(model: nn.Module, *, prefix: str = "geometry/") -> dict[str, float]:
    """Plain numbers for a logger, over the active adapters: constraint residuals, entropy, capacity, magnitude.

    ``orthonormality`` and ``protection`` are the largest entries of xᵀx − I and Fᵀx over all frames, NaN if one is;
    ``spectral_entropy`` is the mean of ``−Σ p log p / log r``, p = σ² / Σσ², over layers, in [0, 1] (1 by
    construction for a scalar core); ``capacity`` is the least share of a frame's free directions that could still be
    protected, in [0, 1]; ``scale`` is the mean of the largest ``|s|``. O(n r (k + r)) per frame, in float64.

    Works for `EBLoRALinear` and for the PEFT method, wrapped by any engine that keeps modules whole.

    Raises:
        ValueError: for a model without such adapters.

    >>> from manifold_cl import EBLoRALinear
    >>> geometry_metrics(EBLoRALinear(nn.Linear(6, 4), 2, complement=torch.eye(6)[:, :3]))["geometry/capacity"]
    0.25
    """
    residuals, shares, entropies, sizes = [], [], [], []
    for layer in _frame_layers(model).values():
        for _, frame, manifold in layer.manifold_parameters():
            residuals.append(manifold.constraint_error(frame))
            n, p = frame.shape
            shares.append(manifold.capacity(p, n) / (n - p) if n > p else 0.0)
        for _, parameter in layer.scale_parameters():
            scale = parameter.detach()
            # A scalar core has one number for all r values, and entropy 1 whatever r is.
            entropies.append(spectral_entropy(scale, max(scale.shape, default=1)))
            sizes.append(float(scale.abs().max()))
    if not residuals:
        raise ValueError(NO_ADAPTERS)
    known = [entropy for entropy in entropies if not math.isnan(entropy)]
    return {
        f"{prefix}orthonormality": float(np.max([value.orthonormality for value in residuals])),
        f"{prefix}protection": float(np.max([value.protection for value in residuals])),
        f"{prefix}spectral_entropy": sum(known) / len(known) if known else math.nan,
        f"{prefix}capacity": min(shares),
        f"{prefix}scale": sum(sizes) / len(sizes),
    }


def validate_on_manifolds(model: nn.Module, *, to: str) -> None:
    """Refuse a model whose frames are off their manifolds; ``to`` says what the adapters are wanted for."""
    validate_frames(_points(model), to=to)


@torch.no_grad()
def retract_adapters(model: nn.Module) -> float:
    """Replace every frame by the nearest point of its manifold; returns the largest constraint residual before.

    For models whose weights were averaged (EMA, SWA, Lookahead): an average of orthonormal frames is not orthonormal.
    Frames that are on their manifolds move by rounding only. Inactive adapters of PEFT models are included.

    Raises:
        ValueError: for a frame without a nearest point, such as an average of opposite frames, or with NaN. Nothing is
            changed then.

    >>> from manifold_cl import EBLoRALinear
    >>> layer = EBLoRALinear(nn.Linear(6, 4), 2)
    >>> layer.left.data.mul_(1.5).shape, retract_adapters(layer) > 1, retract_adapters(layer) < 1e-6
    (torch.Size([4, 2]), True, True)
    """
    moved, largest = [], 0.0
    for name, frame, manifold in _points(model):
        largest = max(largest, *manifold.constraint_error(frame))
        try:
            moved.append((frame, manifold.projx(frame)))
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    if not moved:
        raise ValueError(NO_ADAPTERS)
    for frame, point in moved:
        frame.copy_(point)
    return largest


def _frame_layers(model: nn.Module) -> dict[str, FrameLayer]:
    """All layers with frames, by their names in the model, wrappers included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrameLayer)}


def _points(model: nn.Module) -> Points:
    """The frames of all adapters, inactive ones included, under their names in the model."""
    for name, layer in _frame_layers(model).items():
        yield from ((f"{name}.{key}", frame, manifold) for key, frame, manifold in layer.points())


def _protected_by(manifold: RestrictedStiefel) -> Protected:
    """The subspace that a manifold protects, compact where it is, else without zero columns."""
    basis = manifold.complement
    if basis is None or not manifold.k:
        return None
    if (packed := manifold.packed_complement()) is not None:
        return ProtectedSubspace(basis, packed)
    return basis[:, basis.detach().abs().sum(0) > 0]
