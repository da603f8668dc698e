"""The identity of a model: a few entries of each weight, equal up to rounding or up to an update.

Adapters and protected subspaces are saved with it, and compare it before they are applied to a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import is_conv1d, is_quantised
from manifold_cl.adapters.layers import require_linear

SAMPLES = 16
"""Entries of a weight in its fingerprint."""
UPDATED = 0.5
"""Distance of two fingerprints, relative to their size, beyond which one weight is no update of the other.

Updates of a task change a weight by a few percent. Independent weights differ by about √2, and by less than 0.5 with
probability below 1e-5 per layer.
"""


@dataclass(frozen=True)
class ModelIdentity:
    """A model's name, and fingerprints of its layers. The name is not compared: a copy elsewhere is the same model.

    Args:
        name: ``config.name_or_path``, or the name of the class.
        weights: layer → `fingerprint`; without layers that have none.
    """

    name: str
    weights: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module]) -> ModelIdentity:
        """The identity of ``model``, by the linear layers ``layers``."""
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        prints = {key: fingerprint(require_linear(key, layer)) for key, layer in layers.items()}
        return cls(str(name), {key: text for key, text in prints.items() if text is not None})

    def differences(self, layers: Mapping[str, nn.Module], *, updated: bool = False) -> dict[str, str]:
        """Layer → difference, for layers whose weight belongs to another model.

        Layers that only one side has are left out. ``updated`` accepts weights that differ by an update.
        """
        return {
            key: difference
            for key, text in self.weights.items()
            if key in layers
            and (difference := weight_difference(text, require_linear(key, layers[key]), updated=updated))
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {"name": self.name, "weights": dict(self.weights)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelIdentity:
        """The identity that `to_dict` wrote; of version 1, whose numbers are no fingerprints, the name alone."""
        if "id" in content:
            return cls(content["id"], {})
        return cls(content["name"], dict(content["weights"]))


@torch.no_grad()
def fingerprint(base: nn.Module) -> str | None:
    """`SAMPLES` entries of the weight (m, n) at fixed indices, then the eps of its precision. O(1).

    None where the weight is packed, not there yet or sharded, and where an entry is NaN or infinite.
    """
    entries = _entries(base)
    if entries is None or not bool(entries.isfinite().all()):
        return None
    return " ".join(repr(number) for number in [*entries.tolist(), torch.finfo(cast(Tensor, base.weight).dtype).eps])


def weight_difference(saved: str, base: nn.Module, *, updated: bool = False) -> str | None:
    """The difference between a saved fingerprint and this layer's, in words; None where they agree.

    ``updated`` accepts a relative distance up to `UPDATED`. Otherwise four roundings of the coarser precision are
    accepted, so that a bfloat16 copy of a float32 model is the same.
    """
    entries = _entries(base)
    if entries is None:
        return None
    if not bool(entries.isfinite().all()):
        return "its base weight has NaN or infinite entries"
    try:
        *there, eps = map(float, saved.split())
        if len(there) != SAMPLES or not all(map(math.isfinite, there)) or not 0 < eps < 1:
            raise ValueError
    except (ValueError, AttributeError):
        return f"its fingerprint is not {SAMPLES + 1} numbers"
    eps = max(eps, torch.finfo(cast(Tensor, base.weight).dtype).eps)
    difference = _difference(there, entries.tolist(), eps, updated=updated)
    stored = _entries(base, stored=True) if difference and is_conv1d(base) else None  # the order of version 1
    if stored is not None and _difference(there, stored.tolist(), eps, updated=updated) is None:
        return None
    return difference


def _difference(there: list[float], here: list[float], eps: float, *, updated: bool) -> str | None:
    apart = [a - b for a, b in zip(there, here, strict=True)]
    worst, size = max(map(abs, apart)), max(map(abs, [*there, *here]))
    if worst <= 4 * eps * size:
        return None
    if updated and math.hypot(*apart) <= UPDATED * max(math.hypot(*there), math.hypot(*here)):
        return None
    return f"its base weight differs by up to {worst:.1e} in entries of up to {size:.1e}"


def _entries(base: nn.Module, *, stored: bool = False) -> Tensor | None:
    """`SAMPLES` entries of the weight, float64; None where it is packed, not there yet, or sharded.

    Rows are outputs, also where the weight is stored as (in, out), unless ``stored``.
    """
    weight = cast(Tensor, base.weight)
    if is_quantised(base) or weight.device.type == "meta" or type(weight.data) is not Tensor:
        return None
    matrix = weight.detach().T if is_conv1d(base) and not stored else weight.detach()
    # An irrational stride visits rows and columns alike, whatever the shape.
    indices = (torch.arange(SAMPLES, dtype=torch.float64) * 0.618033988749895 % 1 * matrix.numel()).long()
    indices = indices.to(matrix.device)
    return matrix[indices // matrix.shape[1], indices % matrix.shape[1]].double()
