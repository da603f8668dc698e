"""Which model a memory belongs to: names, shapes, and a few numbers that depend on every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.layers import require_linear, stored_weight
from manifold_cl.linalg import full_precision

SKETCHES = 3
"""Numbers a weight besides its norm."""
APART = 0.05
"""Difference, over the weight's norm, beyond which weights are taken for different ones.

Half precision moves the numbers by about 1e-3 of the norm and the update of a task by about its own relative size;
independent weights of equal size differ by about √2, in at least one of three numbers all but surely.
"""


@dataclass(frozen=True)
class Weight:
    """One layer's weight: its shape (m, n), its norm, and ``uᵀWv`` for three fixed pairs of random signs."""

    shape: tuple[int, int]
    norm: float
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Signature:
    """A model's name and its target weights, tolerant of precision and of small updates, not of other weights."""

    model: str
    weights: Mapping[str, Weight]

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module]) -> Signature:
        """The signature of the layers' present weights. Costs a read of each."""
        config = getattr(model, "config", None)
        name = str(getattr(config, "name_or_path", "") or type(model).__name__)
        return cls(name, {key: _measured(stored_weight(require_linear(key, layer))) for key, layer in layers.items()})

    def differences(self, other: Signature) -> list[str]:
        """Where ``other`` is another model, one line a layer: missing, of another shape, with other weights.

        Names of models are not compared: a copy in another folder is the same model.
        """
        said = [f"{name}: not in the model" for name in self.weights if name not in other.weights]
        for name, mine in self.weights.items():
            theirs = other.weights.get(name)
            if theirs is None:
                continue
            if mine.shape != theirs.shape:
                said.append(f"{name}: weight {mine.shape} there, {theirs.shape} in the model")
                continue
            apart = [
                abs(a - b) for a, b in zip((mine.norm, *mine.numbers), (theirs.norm, *theirs.numbers), strict=True)
            ]
            if not all(difference <= APART * mine.norm for difference in apart):  # NaN is another weight
                said.append(f"{name}: other weights (norm {mine.norm:.4g} there, {theirs.norm:.4g} in the model)")
        return said

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "id": self.model,
            "weights": {
                name: {"shape": list(w.shape), "norm": w.norm, "numbers": list(w.numbers)}
                for name, w in self.weights.items()
            },
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Signature:
        """What `plain` wrote."""
        weights = {
            name: Weight((int(w["shape"][0]), int(w["shape"][1])), float(w["norm"]), tuple(map(float, w["numbers"])))
            for name, w in content["weights"].items()
        }
        return cls(content["id"], weights)


@torch.no_grad()
def _measured(weight: Tensor) -> Weight:
    m, n = weight.shape
    draw = torch.Generator().manual_seed(m * 1_000_003 + n)  # the same signs for every weight of this shape
    left = (2.0 * torch.randint(0, 2, (m, SKETCHES), generator=draw) - 1).to(weight.device)
    right = (2.0 * torch.randint(0, 2, (n, SKETCHES), generator=draw) - 1).to(weight.device)
    with full_precision(weight.device):
        wide = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        numbers = (left.to(wide) * (wide @ right.to(wide))).sum(0)
        norm = torch.linalg.matrix_norm(wide)
    return Weight((m, n), float(norm), tuple(numbers.tolist()))
