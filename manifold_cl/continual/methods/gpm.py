"""GPM: full fine-tuning of the target layers, every update kept outside the input subspaces of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.adapters.base_layers import is_conv1d
from manifold_cl.adapters.layers import named_linears, target_linears
from manifold_cl.continual.methods.bases import ProtectingMethod
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.validation import option
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.rules import validate_number, validate_positive
from manifold_cl.tensor_files import read_tensors, write_tensors

WEIGHTS = "weights.safetensors"


class ProjectedAdamW(torch.optim.AdamW):
    """AdamW whose *displacement* of a weight avoids a subspace of its input space.

    Projecting the gradient alone is not enough: Adam scales entry by entry, which turns the projected gradient back
    into the subspace. Source: saha2021gpm for the projection.

    Args:
        params: weights (m, n).
        avoided: weight → subspace of R^n; weights without an entry move freely.
        transposed: the weights in (in, out) layout, as in GPT-2.
        **options: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        avoided: Mapping[Tensor, ProtectedSubspace],
        *,
        transposed: Iterable[Tensor] = (),
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self._avoided = dict(avoided)
        self._transposed = set(transposed)

    def _projected(self, p: Tensor, change: Tensor) -> Tensor:
        if p in self._transposed:
            return self._avoided[p].project_out(change)
        return self._avoided[p].project_out(change.mT).mT

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step, without its part in the avoided subspace."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        before = {p: p.detach().clone() for p in self._avoided if p.grad is not None}
        for p in before:
            assert p.grad is not None
            p.grad = self._projected(p, p.grad)
        super().step()
        for p, old in before.items():
            p.copy_(old + self._projected(p, p - old))
        return loss


@dataclass
class GPM(ProtectingMethod):
    """Full weights of the target layers train; updates are orthogonal to the inputs of earlier tasks.

    No low rank: a task stores all its weights. Biases stay frozen. The memory holds inputs, at the energy threshold
    ``energy + growth · t``. The first task leaves out the direction that crosses the threshold.

    Source: saha2021gpm; docs/method.md, "The other methods".

    Args:
        energy: threshold at the first task.
        statistic_examples: training examples whose inputs the memory is grown from.
        lr: of the weights, under AdamW.
        growth: increase of the threshold per further task.
        shared_inputs: as in `EBLoRA`.
    """

    name = "gpm"
    source = "activation"

    statistic_examples: int = 128
    lr: float = option(7e-5, validate_positive)
    growth: float = option(0.003, partial(validate_number, least=0.0))
    shared_inputs: bool = False
    _layers: dict[str, nn.Module] = field(default_factory=dict, init=False, repr=False)

    def validate_model(self, model: nn.Module, targets: Sequence[str]) -> None:
        """As every method; TypeError for a weight in half precision, which small steps would not move."""
        for name, layer in target_linears(model, targets).items():
            if (dtype := cast(Tensor, layer.weight).dtype) not in (torch.float32, torch.float64):
                raise TypeError(
                    f"the weight of {name} is {dtype}, and gpm trains the weights themselves: load these layers in "
                    "float32 (merged_dtype of the streams), half precision loses small steps"
                )
        super().validate_model(model, targets)

    def keep_updates(self) -> None:
        """Raise ValueError: the weights themselves train."""
        raise ValueError("gpm trains the weights of the layers, there is no update to keep beside them: merge instead")

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Unfreeze the weights of the target layers."""
        model.requires_grad_(False)
        self._layers = target_linears(model, stage.targets)
        self.open_memory(self._layers)
        for weight in self._weights().values():
            weight.requires_grad_(True)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """`ProjectedAdamW` over the weights, without decay."""
        assert self.memory is not None
        weights = self._weights()
        avoided = {weight: self.memory[name] for name, weight in weights.items() if self.memory[name].k}
        transposed = [weight for name, weight in weights.items() if is_conv1d(self._layers[name])]
        return ProjectedAdamW(weights.values(), avoided, transposed=transposed, lr=self.lr, weight_decay=0.0)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Freeze, then let the memory grow by the inputs of this task."""
        model.requires_grad_(False)
        self.grow_memory(model, stage, threshold_rule="exclusive")

    def threshold(self, stage: Stage) -> float:
        """The energy threshold after this stage, at most 1."""
        return min(1.0, self.energy + self.growth * stage.index)

    def save_update(self, model: nn.Module, folder: Path, stage: Stage) -> None:
        """Write the present weights of the target layers."""
        tensors = {f"{name}.weight": weight for name, weight in self._weights().items()}
        write_tensors(folder / WEIGHTS, tensors, {"task": stage.task.name})

    @torch.no_grad()
    def _restore_model(self, model: nn.Module, folders: Sequence[Path]) -> None:
        linears = named_linears(model)
        for folder in folders[-1:]:
            for name, weight in read_tensors(folder / WEIGHTS)[0].items():
                cast(Tensor, linears[name.removesuffix(".weight")].weight).copy_(weight)

    def _weights(self) -> dict[str, Tensor]:
        return {name: cast(Tensor, layer.weight) for name, layer in self._layers.items()}


def reach(update: Tensor, subspace: ProtectedSubspace) -> float:
    """``|ΔW F| / |ΔW|``: the share of an update of a weight (m, n) that acts on the subspace, in [0, 1]."""
    size = float(torch.linalg.matrix_norm(update.double()))
    return float(torch.linalg.matrix_norm(update.double() @ subspace.basis.double())) / size if size else 0.0
