"""GPM: full fine-tuning of the target layers, every update kept off the input subspaces of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.adapters.base_layers import is_conv1d
from manifold_cl.adapters.layers import device_of, named_linears, target_linears
from manifold_cl.continual.checks import check_number, check_positive, check_share, check_whole
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.remembering import Remembering
from manifold_cl.continual.subspaces import SubspaceMemory, grown
from manifold_cl.files import VERSION, read_tensors, write_tensors
from manifold_cl.geometry import ProtectedSubspace

WEIGHTS_FORMAT = "manifold_cl.weights"


class ProjectedAdamW(torch.optim.AdamW):
    """AdamW whose *displacement* of a weight avoids a subspace of its input space.

    Projecting the gradient alone is not enough: Adam scales entry by entry, which turns the projected gradient back
    into the subspace. Source: saha2021gpm for the projection.

    Args:
        params: weights (m, n).
        avoided: weight → subspace of R^n; weights without one move freely.
        transposed: those of the weights that are stored as (n, m), as GPT-2's are.
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
        """The part of a change of the weight ``p`` that avoids its subspace."""
        if p in self._transposed:
            return self._avoided[p].project_out(change)
        return self._avoided[p].project_out(change.mT).mT

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step, what of it lies in the avoided subspace taken back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = {p: p.detach().clone() for p in self._avoided if p.grad is not None}
        for p in before:
            assert p.grad is not None
            p.grad = self._projected(p, p.grad)
        super().step()
        for p, old in before.items():
            p.copy_(old + self._projected(p, p - old))
        return loss


@dataclass
class GPM(Remembering):
    """The weights of the target layers train; updates are orthogonal to the inputs that earlier tasks saw.

    No low rank: a task stores all its weights. Biases stay frozen. The memory is of inputs, at the energy threshold
    ``energy + growth · t``; the first task drops the direction that crosses it.

    Source: saha2021gpm; method.md 7.

    Args:
        lr: of the weights, under AdamW.
        energy: threshold at the first task.
        growth: what each further task adds to it.
        statistic_examples: training examples whose inputs are remembered.
    """

    name = "gpm"

    lr: float = 7e-5
    energy: float = 0.97
    growth: float = 0.003
    statistic_examples: int = 128
    memory: SubspaceMemory | None = field(default=None, init=False, repr=False)
    _layers: dict[str, nn.Module] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_share("energy", self.energy)
        check_number("growth", self.growth, least=0.0)
        check_whole("statistic_examples", self.statistic_examples)

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Unfreeze the weights of the target layers."""
        model.requires_grad_(False)
        self._layers = target_linears(model, stage.targets)
        if self.memory is None:
            self.memory = SubspaceMemory.empty(self._layers)
        self.memory.require_layers(self._layers)
        self.memory = self.memory.to(device_of(self._layers))
        for weight in self._weights().values():
            weight.requires_grad_(True)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """`ProjectedAdamW` over the weights, without decay."""
        assert self.memory is not None
        weights = self._weights()
        avoided = {weight: self.memory[name] for name, weight in weights.items() if self.memory[name].k}
        transposed = [weight for name, weight in weights.items() if is_conv1d(self._layers[name])]
        return ProjectedAdamW(weights.values(), avoided, transposed=transposed, lr=self.lr, weight_decay=0.0)

    def _weights(self) -> dict[str, Tensor]:
        """The weights that train, as they are stored."""
        return {name: cast(Tensor, layer.weight) for name, layer in self._layers.items()}

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Freeze, then let the memory grow by the inputs of this task."""
        model.requires_grad_(False)
        assert self.memory is not None
        self.memory = grown(
            self.memory,
            self._layers,
            lambda: stage.losses(model, self.statistic_examples, "memory"),
            source="activation",
            energy=self.threshold(stage.index),
            rank=1,
            crossing="dropped",
            generator=stage.generator("memory sketch"),
            task=stage.task.name,
        )

    def threshold(self, index: int) -> float:
        """The energy threshold after task number ``index``, at most 1."""
        return min(1.0, self.energy + self.growth * index)

    def save_update(self, model: nn.Module, folder: Path, stage: Stage) -> None:
        """Write the weights of the target layers as they are now."""
        tensors = {f"{name}.weight": weight for name, weight in self._weights().items()}
        layers = {name: {"weight": list(weight.shape)} for name, weight in self._weights().items()}
        manifest = {"format": WEIGHTS_FORMAT, "version": VERSION, "task": stage.task.name, "layers": layers}
        write_tensors(folder / "weights", tensors, manifest)

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the memory."""
        assert self.memory is not None
        self.memory.save(folder, task=stage.task.name, energy=self.threshold(stage.index), source="activation")

    @torch.no_grad()
    def restore(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Read the last weights and the last memory."""
        if not folders:
            return
        tensors, manifest = read_tensors(folders[-1] / "weights", expected=WEIGHTS_FORMAT)
        linears = named_linears(model)
        for name in manifest["layers"]:
            cast(Tensor, linears[name].weight).copy_(tensors[f"{name}.weight"])
        self.load_state(folders[-1])


def reach(update: Tensor, subspace: ProtectedSubspace) -> float:
    """``|ΔW F| / |ΔW|``: how much of an update of a weight (m, n) acts on the subspace, in [0, 1]."""
    size = float(torch.linalg.matrix_norm(update.double()))
    return float(torch.linalg.matrix_norm(update.double() @ subspace.basis.double())) / size if size else 0.0
