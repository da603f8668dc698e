"""EBLoRA: balanced spectra on the restricted Stiefel manifold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.adapters import EBLoRALinear, inject_adapters, merge_adapters, read_adapters
from manifold_cl.adapters.layers import device_of, target_linears
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.options import Core
from manifold_cl.continual.checks import check_number, check_positive, check_share, check_whole
from manifold_cl.continual.method import Stage
from manifold_cl.continual.methods.remembering import Remembering
from manifold_cl.continual.subspaces import (
    Policy,
    SubspaceMemory,
    check_policy,
    grown,
    leading_directions,
    sources_in,
    with_weights,
    without_updates,
)
from manifold_cl.optim import RiemannianAdamW, param_groups


@dataclass
class EBLoRA(Remembering):
    """One magnitude and two orthonormal frames a layer, the input frame orthogonal to what earlier tasks rely on.

    Each task starts from the leading directions of its own gradient outside the memory, trains with
    `RiemannianAdamW`, is merged, and then grows the memory by the energy rule.

    Source: gu2026eblora; method.md 1-2. The defaults won on the validation stream
    (``benchmarks/results/tuning-eblora.json``).

    Args:
        rank: r.
        alpha: numerator of the scaling alpha / r.
        lr: of the frames.
        scale_lr: of the magnitudes.
        initial_scale: s at the start of a task; negative is a descent step along the gradient.
        initial_scale_last: s in the last block, from which it runs linearly in depth to ``initial_scale`` in the
            first; the same everywhere if None. Blocks are told by the first number in a layer's name.
        scale_decay: weight decay of the magnitudes.
        energy: share of each task's energy that the memory must hold, in (0, 1].
        source: what the memory protects: ``"gradient"`` (directions of the mean), ``"activation"`` (inputs),
            ``"sensitivity"`` (inputs weighted by their loss gradient), or a union such as ``"activation+gradient"``.
        statistic_examples: training examples that start and memory are computed from.
        statistics_at: the model that they are computed at: ``"merged"``, or ``"pretrained"`` as in the released code.
        from_weights: share of the pre-trained weights' energy that is protected from the start; 0 for none.
        policy: what happens where a layer is full: ``"stop"``, ``"evict"`` or ``"raise"``.
        step: ``"corrected"`` or ``"official"`` (see `manifold_cl.optim`).
    """

    name = "eblora"
    core: ClassVar[Core] = "scalar"

    rank: int = 16
    alpha: float = 32.0
    lr: float = 6e-3
    scale_lr: float = 2e-2
    initial_scale: float = -0.05
    initial_scale_last: float | None = None
    scale_decay: float = 0.0
    energy: float = 0.97
    source: str = "sensitivity"
    statistic_examples: int = 160
    statistics_at: Literal["merged", "pretrained"] = "merged"
    from_weights: float = 0.0
    policy: Policy = "stop"
    step: Literal["corrected", "official"] = "corrected"
    memory: SubspaceMemory | None = field(default=None, init=False, repr=False)
    updates: list[dict[str, Factors]] = field(default_factory=list, init=False, repr=False)
    """What was merged so far; kept for statistics at the pre-trained model only."""

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_positive("lr", self.lr)
        check_positive("scale_lr", self.scale_lr)
        check_number("initial_scale", self.initial_scale)
        if self.initial_scale_last is not None:
            check_number("initial_scale_last", self.initial_scale_last)
        check_number("scale_decay", self.scale_decay, least=0.0)
        check_share("energy", self.energy)
        check_whole("statistic_examples", self.statistic_examples)
        sources_in(self.source)
        if self.statistics_at not in ("merged", "pretrained"):
            raise ValueError(f"statistics_at is merged or pretrained, got {self.statistics_at!r}")
        check_share("from_weights", self.from_weights, zero=True, one=False)
        check_policy(self.policy)
        if self.step not in ("corrected", "official"):
            raise ValueError(f"step is corrected or official, got {self.step!r}")

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters that start along the task's gradient, off the memory."""
        layers = target_linears(model, stage.targets)
        if self.memory is None:
            self.memory = SubspaceMemory.empty(layers)
            if self.from_weights:
                self.memory = with_weights(self.memory, layers, rank=self.rank, energy=self.from_weights)
        self.memory.require_layers(layers)
        memory = self.memory = self.memory.to(device_of(layers))
        with without_updates(model, self.updates):
            starts = leading_directions(
                layers,
                lambda: stage.losses(model, self.statistic_examples, "start"),
                self.rank,
                memory,
                generator=stage.generator("sketch"),
            )
        frames = stage.generator("adapters")
        scales = self._initial_scales(list(layers))
        adapters = inject_adapters(
            model,
            stage.targets,
            lambda name, linear: EBLoRALinear(
                linear,
                self.rank,
                complement=memory[name],
                core=self.core,
                initial_scale=scales[name],
                alpha=self.alpha,
                generator=frames,
            ),
        )
        for name, adapter in adapters.items():
            assert isinstance(adapter, EBLoRALinear)
            adapter.point_along(starts[name].left, starts[name].right)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """`RiemannianAdamW` over frames and magnitudes."""
        groups = param_groups(model, lr=self.lr, scale_lr=self.scale_lr)
        for group in groups:
            if group["role"] == "scales":
                group["weight_decay"] = self.scale_decay
        optimizer: Optimizer = RiemannianAdamW(groups, lr=self.lr, weight_decay=0.0, step_rule=self.step)
        return optimizer

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then let the memory grow by what this task relies on in the merged model."""
        added = merge_adapters(model)
        if self.statistics_at == "pretrained":
            self.updates.append(added)
        assert self.memory is not None
        layers = target_linears(model, stage.targets)
        with without_updates(model, self.updates):
            memory = grown(
                self.memory,
                layers,
                lambda: stage.losses(model, self.statistic_examples, "memory"),
                source=self.source,
                energy=self.energy,
                rank=self.rank,
                policy=self.policy,
                generator=stage.generator("memory sketch"),
                task=stage.task.name,
            )
        self.memory = memory.signed(model, layers)

    def state(self) -> Iterator[Tensor]:
        """The protected bases, and the updates that lead back to the pre-trained model where that is asked."""
        yield from super().state()
        for factors in (factors for update in self.updates for factors in update.values()):
            yield from (factors.left, factors.right, factors.magnitude)

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the memory."""
        assert self.memory is not None
        self.memory.save(folder, task=stage.task.name, energy=self.energy, source=self.source)

    def restore(self, model: nn.Module, folders: Sequence[Path]) -> None:
        """Merge the updates again and read the last memory."""
        super().restore(model, folders)
        self.memory = SubspaceMemory.load(folders[-1], model=model) if folders else None
        self.updates = [read_adapters(f) for f in folders] if self.statistics_at == "pretrained" else []

    def _initial_scales(self, names: Sequence[str]) -> dict[str, float]:
        """s₀ by layer: ``first + (last − first) l / (L − 1)`` in block l of L. Source: method.md 1.4."""
        first = self.initial_scale
        if self.initial_scale_last is None:
            return dict.fromkeys(names, first)
        numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in names}
        deepest = max(max(numbers.values()), 1)
        return {name: first + (self.initial_scale_last - first) * block / deepest for name, block in numbers.items()}
