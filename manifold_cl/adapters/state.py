"""Figures of a model's adapters while they train: on the manifold, balanced, with room left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from manifold_cl.adapters.cores import spectral_entropy
from manifold_cl.adapters.eblora import EBLoRALinear
from manifold_cl.adapters.named import NamedAdapters
from manifold_cl.geometry import RestrictedStiefel


def geometry_metrics(model: nn.Module, *, prefix: str = "geometry/") -> dict[str, float]:
    """Plain numbers for a logger, over the adapters that train: constraint errors, entropy, capacity, magnitude.

    ``orthonormality`` and ``protection`` are the largest entries of xᵀx − I and Fᵀx over all frames;
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
        f"{prefix}orthonormality": max(error.orthonormality for error in errors),
        f"{prefix}protection": max(error.protection for error in errors),
        f"{prefix}spectral_entropy": sum(known) / len(known) if known else math.nan,
        f"{prefix}capacity": min(shares),
        f"{prefix}scale": sum(sizes) / len(sizes),
    }


def _balanced(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, EBLoRALinear) or (isinstance(module, NamedAdapters) and module.acting()):
            yield module


def _capacity(manifold: RestrictedStiefel, n: int, p: int) -> float:
    return manifold.capacity(p, n) / (n - p) if n > p else 0.0
