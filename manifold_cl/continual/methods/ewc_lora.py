"""EWC-LoRA: a penalty on the entries that the gradients of earlier tasks are sensitive to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import is_conv1d, sides, validate_plain_weight
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual.methods.entry_penalty import EntryPenalty
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.validation import option
from manifold_cl.rules import validate_number, validate_whole
from manifold_cl.tensor_files import read_tensors, write_tensors

FILE = "importance.safetensors"


@dataclass
class EWCLoRA(EntryPenalty):
    """`SequentialMerge` with ``λ/2 Σ Ω_ij (ΔW_ij)² / mean(Ω)`` added to the loss, Ω a sum of Fisher diagonals.

    When a task ends, ``Ω ← γ Ω + F``, with ``F_ij`` the mean over examples of the squared gradient in the weight,
    at the merged model. The penalty is centred at the merged weights, of which each update is the distance.

    Published are the penalty and Ω. The released code adds factors instead of updates, which changes the function
    between tasks, and squares gradients of batches; here updates are merged, gradients are per example, and λ is
    relative to the mean of Ω.

    Source: zheng2026revisiting; docs/method.md, "The other methods".

    Args:
        strength: λ.
        decay: γ; 1 keeps all tasks alike.
        statistic_examples: training examples for the gradients, one backward pass each.
    """

    name = "ewc_lora"
    factor = 0.5

    decay: float = option(1.0, partial(validate_number, least=0.0))
    statistic_examples: int = option(160, validate_whole)

    def validate_model(self, model: nn.Module, targets: Sequence[str]) -> None:
        """As every method; TypeError for a quantised weight, which has no gradients."""
        super().validate_model(model, targets)
        for name, layer in target_linears(model, targets).items():
            validate_plain_weight(layer, to="take gradients of", name=name)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then add the task's importance."""
        super().end_task(model, stage)
        layers = target_linears(model, stage.targets)
        fisher = fisher_diagonals(model, layers, stage, self.statistic_examples)
        old = self.importance
        self.importance = {n: self.decay * old[n].to(new) + new if n in old else new for n, new in fisher.items()}

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the importance."""
        write_tensors(folder / FILE, self.importance, {"task": stage.task.name})

    def load_state(self, folder: Path) -> None:
        """Read the importance."""
        self.importance = read_tensors(folder / FILE)[0]


def fisher_diagonals(model: nn.Module, layers: dict[str, nn.Module], stage: Stage, examples: int) -> dict[str, Tensor]:
    """Layer → the mean of squared gradients (m, n) of single examples' losses in the layer's weight, float32.

    A layer that an example does not reach has a gradient of 0 there.

    Raises:
        TypeError: a weight is quantised.
    """
    for name, layer in layers.items():
        validate_plain_weight(layer, to="take gradients of", name=name)
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    sums = [torch.zeros(sides(layer), device=w.device) for layer, w in zip(layers.values(), weights, strict=True)]
    flags = [weight.requires_grad for weight in weights]
    count = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for loss in replace(stage, batch_size=1).losses(model, examples, "importance")():
            gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
            for layer, total, gradient in zip(layers.values(), sums, gradients, strict=True):
                total.add_((gradient.mT if is_conv1d(layer) else gradient).float().square())
            count += 1
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return {name: total / max(count, 1) for name, total in zip(layers, sums, strict=True)}
