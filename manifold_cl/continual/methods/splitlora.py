"""SplitLoRA: a frozen random input factor among the directions that earlier inputs use least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.bases import AdapterMethod
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import measure_input_moments
from manifold_cl.continual.validation import option
from manifold_cl.rules import validate_positive, validate_whole
from manifold_cl.tensor_files import read_tensors, write_tensors

FILE = "moments.safetensors"


@dataclass
class SplitLoRA(AdapterMethod):
    """LoRA whose input factor is random among the minor directions of earlier inputs, and frozen.

    After t tasks, a direction of the mean input moment is minor if its eigenvalue is below ``α/t`` times their mean, so
    that fewer directions are free as tasks come. The factor is scaled to the Frobenius norm of LoRA's start over the
    number of the task. The first task has LoRA's own factor.

    Published is the rule, here in closed form: its objective is a sum over directions. Each task's moment is divided by
    its trace, so that tasks weigh alike, and the scaling alpha / r is that of the other methods: both are ours.

    Source: qiu2026splitlora; docs/method.md, "The other methods".

    Args:
        trade_off: α; larger values leave more directions free.
        statistic_examples: training examples for the input moments.
    """

    name = "splitlora"
    exact_moments = True
    frozen_inputs = True

    trade_off: float = option(20.0, validate_positive)
    statistic_examples: int = option(160, validate_whole)
    moments: dict[str, Tensor] = state_field(dict)
    """Layer → mean of the input moments (n, n) of the tasks so far, each of trace 1."""
    minor: dict[str, Tensor] = state_field(dict)
    """Layer → orthonormal basis (n, k) of the directions that are free for the next task."""

    @torch.no_grad()
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters with frozen input factors and zero output factors."""
        draw = stage.generator("minor directions")
        for name, adapter in self.inject_lora(model, stage).items():
            if name in self.minor:
                basis = self.minor[name].to(adapter.right)  # read from a file, it is on the CPU
                mixed = basis @ torch.randn(basis.shape[1], self.rank, generator=draw).to(basis)
                norm = torch.linalg.vector_norm(adapter.right) / (stage.index + 1)
                adapter.right.copy_(mixed * (norm / torch.linalg.vector_norm(mixed)))
            adapter.right.requires_grad_(False)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then add the moments of the inputs at the merged model."""
        super().end_task(model, stage)
        losses = stage.losses(model, self.statistic_examples, "memory")
        for name, moment in measure_input_moments(target_linears(model, stage.targets), losses).items():
            now = moment / moment.trace()
            old = self.moments.get(name, now)
            self.moments[name] = torch.lerp(old.to(now), now, 1.0 / (stage.index + 1))
        self._split(stage.index + 1)

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """The moments, and at most as much for the minor directions."""
        return 8 * sum(sides(layer)[1] ** 2 for layer in layers.values())

    def _split(self, tasks: int) -> None:
        """Choose the minor directions after so many tasks."""
        self.minor = {name: minor_directions(m, self.trade_off / tasks) for name, m in self.moments.items()}

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the moments."""
        write_tensors(folder / FILE, self.moments, {"task": stage.task.name, "tasks": stage.index + 1})

    def load_state(self, folder: Path) -> None:
        """Read the moments, and choose the minor directions again."""
        self.moments, manifest = read_tensors(folder / FILE)
        self._split(manifest["tasks"])

    def state(self) -> Iterator[Tensor]:
        """The moments."""
        yield from self.moments.values()

    def capacity(self) -> dict[str, float]:
        """Mean and largest share of input directions that are not free."""
        shares = [1 - basis.shape[1] / basis.shape[0] for basis in self.minor.values()]
        return {"mean_fraction": sum(shares) / len(shares), "max_fraction": max(shares)} if shares else {}


def minor_directions(moment: Tensor, level: float) -> Tensor:
    """Eigenvectors (n, k) of a moment whose eigenvalues are below `level` times their mean; at least the smallest one.

    >>> minor_directions(torch.diag(torch.tensor([9.0, 2.0, 1.0])), 1.0).shape  # mean 4
    torch.Size([3, 2])
    """
    values, vectors = torch.linalg.eigh(moment.double())
    count = max(1, int((values < level * values.mean()).sum()))
    return cast(Tensor, vectors[:, :count].to(moment.dtype))
