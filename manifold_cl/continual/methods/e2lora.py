"""E²-LoRA: output directions ordered by energy; weak ones are released to later tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manifold_cl.adapters import LoRALinear, adapters_of, inject_adapters
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import device_of, target_linears
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.sequential import SequentialMerge
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import measure_input_moments
from manifold_cl.continual.validation import option, unless_none
from manifold_cl.rules import validate_whole
from manifold_cl.tensor_files import read_tensors, write_tensors

FILE = "components.safetensors"
STEPS = 10**5
"""The threshold falls in steps of 1 / STEPS, from 1 − 1 / STEPS."""


class Components(NamedTuple):
    """Rank-one parts of a task's update: ``Σ_i left_i right_iᵀ``, in falling order of variance."""

    left: Tensor
    """(m, k), orthonormal."""
    right: Tensor
    """(n, k)."""
    variance: Tensor
    """(k,): of the outputs along each left vector, float64."""

    def part(self, columns: slice) -> Components:
        """Some of the parts."""
        return Components(self.left[:, columns], self.right[:, columns], self.variance[columns])


@dataclass
class E2LoRA(SequentialMerge):
    """All tasks share K output directions; each task keeps those with most energy and releases the others.

    The first task trains LoRA of rank K. When a task ends, its update is written as parts along the principal
    directions of its outputs. When the next one begins, every task keeps its leading parts up to a common share of
    energy, the largest one at which at most ``(t − 1)/t`` of the K directions are taken. The other parts are deleted
    from the model, and their output directions become the frozen output factor of the new task, which trains the
    input factor alone. Outputs of different tasks are therefore orthogonal. It is the opposite of balance: of a
    concentrated update, less is lost.

    Published are these rules for K = m, with principal directions of one batch after centring, and a distillation
    loss. The budget K, uncentred moments of ``statistic_examples``, and no distillation are ours. So is the rest of the
    ``(t − 1)/t``: where the common share takes less, the next parts by their share stay too, so that all layers
    have one rank.

    Source: li2026energy; docs/method.md, "The other methods".

    Args:
        budget: K per layer, at most the smallest side of a layer; 4 r if not given.
        statistic_examples: training examples for the outputs' energies.
    """

    name = "e2lora"
    exact_moments = True

    budget: int | None = option(None, unless_none(validate_whole))
    statistic_examples: int = option(160, validate_whole)
    components: dict[str, list[Components]] = state_field(dict)
    """Layer → the kept parts of each task so far."""

    def first_rank(self, layers: Mapping[str, nn.Module]) -> int:
        """The budget, or the smallest side of a layer if that is less."""
        return min(4 * self.rank if self.budget is None else self.budget, *(min(sides(x)) for x in layers.values()))

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """The parts: two vectors and a variance in float64 for each of the budget's directions."""
        return self.first_rank(layers) * sum(4 * sum(sides(layer)) + 8 for layer in layers.values())

    @torch.no_grad()
    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters of the free rank; of later tasks only the input factors train."""
        layers = target_linears(model, stage.targets)
        device = device_of(layers)  # parts of a resumed run come from a file
        self.components = {n: [Components(*(x.to(device) for x in p)) for p in ps] for n, ps in self.components.items()}
        budget = self.first_rank(layers)
        if budget <= stage.index:
            raise ValueError(f"budget is {budget}, too few directions for {stage.index + 1} tasks: raise it")
        limit = budget * stage.index // (stage.index + 1)
        released = {name: self._release(name, limit) for name in self.components}
        rank, draw = budget - limit, stage.generator("adapters")

        def make(_: str, layer: nn.Module) -> LoRALinear:
            return LoRALinear(layer, rank, alpha=self.alpha / self.rank * rank, generator=draw)

        for name, adapter in inject_adapters(model, stage.targets, make).items():
            if name in released:
                left, right = released[name]
                adapter.left.copy_(left)
                adapter.right.copy_(right)
                adapter.compensate()  # the released parts are subtracted
                adapter.right.zero_()
                adapter.left.requires_grad_(False)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, and write the update as parts along the principal directions of its outputs."""
        factors = {n: (a.left.detach().clone(), a.right.detach().clone()) for n, a in adapters_of(model).items()}
        super().end_task(model, stage)
        losses = stage.losses(model, self.statistic_examples, "outputs")
        moments = measure_input_moments(target_linears(model, stage.targets), losses)
        for name, (left, right) in factors.items():
            parts = principal_parts(left, right, moments[name])
            self.components.setdefault(name, []).append(parts)

    def _release(self, name: str, limit: int) -> tuple[Tensor, Tensor]:
        """Delete all parts of a layer but ``limit`` of them, and return the factors of the deleted ones."""
        kept = self.components[name]
        counts = kept_counts([parts.variance for parts in kept], limit)
        weak = [parts.part(slice(count, None)) for parts, count in zip(kept, counts, strict=True)]
        self.components[name] = [parts.part(slice(count)) for parts, count in zip(kept, counts, strict=True)]
        return torch.cat([parts.left for parts in weak], dim=1), torch.cat([parts.right for parts in weak], dim=1)

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the parts."""
        tensors = {
            f"{name}.{index}.{key}": value
            for name, tasks in self.components.items()
            for index, parts in enumerate(tasks)
            for key, value in parts._asdict().items()
        }
        write_tensors(folder / FILE, tensors, {"task": stage.task.name, "tasks": stage.index + 1})

    def load_state(self, folder: Path) -> None:
        """Read the parts."""
        tensors, manifest = read_tensors(folder / FILE)
        names = dict.fromkeys(key.rsplit(".", 2)[0] for key in tensors)
        self.components = {
            name: [
                Components(*(tensors[f"{name}.{index}.{key}"] for key in Components._fields))
                for index in range(manifest["tasks"])
            ]
            for name in names
        }

    def state(self) -> Iterator[Tensor]:
        """The parts."""
        yield from (value for tasks in self.components.values() for parts in tasks for value in parts)


def principal_parts(left: Tensor, right: Tensor, moment: Tensor) -> Components:
    """The parts of ``left rightᵀ`` along the principal directions of its outputs for inputs of this second moment.

    With ``left = Q T`` and ``T rightᵀ C right Tᵀ = V diag(v) Vᵀ``: left vectors ``Q V``, right ones ``right Tᵀ V``. In
    float64. O((m + n) r² + n² r).
    """
    basis, triangle = torch.linalg.qr(left.double())
    inputs = right.double() @ triangle.mT
    values, vectors = torch.linalg.eigh(inputs.mT @ moment.double() @ inputs)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    return Components((basis @ vectors).to(left.dtype), (inputs @ vectors).to(right.dtype), values)


def kept_counts(variances: Sequence[Tensor], limit: int) -> list[int]:
    """How many leading parts each task keeps, ``limit`` in all, at least one per task.

    Those up to the largest common share of energy at which they are at most ``limit``, then the next ones with the
    largest share of their task's energy. A task without any energy keeps one part.

    >>> kept_counts([torch.tensor([8.0, 1.0, 1.0]), torch.tensor([5.0, 5.0, 0.0])], 3)  # shares .8 .9 1 and .5 1 1
    [1, 2]
    """
    energies = [variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny) for variance in variances]
    shares = [energy.cumsum(0) if energy.any() else torch.ones_like(energy) for energy in energies]

    def counts(step: int) -> list[int]:
        threshold = 1 - step / STEPS
        return [min(len(share), 1 + int((share <= threshold).sum())) for share in shares]

    low, high = 1, STEPS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(counts(middle)) <= limit else (middle + 1, high)
    chosen = counts(low)
    while sum(chosen) < limit:
        nexts = [
            float(each[count]) if count < len(each) else -1.0 for each, count in zip(energies, chosen, strict=True)
        ]
        chosen[nexts.index(max(nexts))] += 1
    return chosen
