"""Base classes of methods: adapters, protected subspaces, frozen input factors, orthonormal frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.adapters import Adapter, EBLoRALinear, LoRALinear, inject_adapters
from manifold_cl.adapters.layers import device_of, target_linears
from manifold_cl.adapters.options import Core
from manifold_cl.continual.method import Method, state_field
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import (
    Passes,
    Policy,
    SingularTriplets,
    SubspaceMemory,
    grow_memory,
    grow_memory_from_weights,
    leading_directions,
)
from manifold_cl.continual.validation import one_of, option, unless_none
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.geometry.subspace import ThresholdRule
from manifold_cl.optim import RiemannianAdamW, RiemannianMuon, param_groups
from manifold_cl.optim.own_bases import DIRECTIONS
from manifold_cl.rules import validate_number, validate_positive, validate_share, validate_whole

STEPS = ("corrected", "official", "spectral")


@dataclass
class AdapterMethod(Method):
    """A method that trains fresh adapters for every task and merges them when the task ends.

    Args:
        rank: r.
        alpha: numerator of the scaling alpha / r.
        lr: peak learning rate.
    """

    exact_moments: ClassVar[bool] = False
    """Whether a pass over a task holds the second moments (n, n) of the inputs of all layers at once."""
    frozen_inputs: ClassVar[bool] = False
    """Whether input factors are chosen, and do not train."""

    rank: int = option(16, validate_whole)
    alpha: float = option(32.0, validate_positive)
    lr: float = option(1e-3, validate_positive)

    def first_rank(self, layers: Mapping[str, nn.Module]) -> int:
        """The rank of the adapters of the first task; later ones are no larger."""
        return self.rank

    def carried_nbytes(self, layers: Mapping[str, nn.Module]) -> int:
        """Bytes that stay on the device once one task has ended, beside weights and protected bases."""
        return 0

    def inject_lora(self, model: nn.Module, stage: Stage) -> dict[str, Adapter]:
        """Inject LoRA adapters that start at ``ΔW = 0``; layer → adapter."""
        draw = stage.generator("adapters")
        return inject_adapters(
            model,
            stage.targets,
            lambda _, layer: LoRALinear(layer, self.rank, alpha=self.alpha, generator=draw),
        )

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW without weight decay over all parameters that train."""
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge."""
        self.merge(model)


@dataclass
class ProtectingMethod(Method):
    """A method with a memory: in every layer, a subspace of inputs that later tasks do not change."""

    energy: float = option(0.97, validate_share)
    statistic_examples: int = option(160, validate_whole)
    memory: SubspaceMemory | None = state_field(lambda: None)

    # Options of some subclasses; methods without adapters keep one direction free.
    rank = 1
    source = "sensitivity"
    from_weights = 0.0
    shared_inputs = False
    compact_memory = False

    def threshold(self, stage: Stage) -> float:
        """Share of the task's energy that the memory holds after this stage."""
        return self.energy

    def open_memory(self, layers: Mapping[str, nn.Module]) -> SubspaceMemory:
        """The memory of earlier tasks, for exactly these layers and on their device."""
        if self.memory is None:
            self.memory = SubspaceMemory.empty(layers, compact=self.compact_memory)
            if self.from_weights:
                self.memory = grow_memory_from_weights(self.memory, layers, rank=self.rank, energy=self.from_weights)
        self.memory.require_layers(layers)
        self.memory = self.memory.to(device_of(layers))
        return self.memory

    def grow_memory(
        self, model: nn.Module, stage: Stage, *, policy: Policy = "stop", threshold_rule: ThresholdRule = "inclusive"
    ) -> None:
        """Let the memory grow by the protected directions of this task at the present model."""
        assert self.memory is not None
        self.memory = grow_memory(
            self.memory,
            target_linears(model, stage.targets),
            stage.losses(model, self.statistic_examples, "memory"),
            source=self.source,
            energy=self.threshold(stage),
            rank=self.rank,
            policy=policy,
            threshold_rule=threshold_rule,
            task=stage.task.name,
            passes=Passes(seed=stage.derive_seed("memory sketch"), shared_inputs=self.shared_inputs),
        )

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the memory."""
        assert self.memory is not None
        self.memory.save(folder, task=stage.task.name, energy=self.threshold(stage), source=self.source)

    def load_state(self, folder: Path) -> None:
        """Read the memory."""
        self.memory = SubspaceMemory.load(folder)

    def _restore_state(self, model: nn.Module, folders: Sequence[Path]) -> None:
        self.memory = SubspaceMemory.load(folders[-1], model=model)

    def state(self) -> Iterator[Tensor]:
        """The protected bases."""
        yield from (subspace.basis for subspace in self.memory.subspaces.values()) if self.memory else ()

    def capacity(self) -> dict[str, float]:
        """Mean and largest share of protected input directions, and the number of full layers."""
        return self.memory.occupancy() if self.memory else {}


@dataclass
class FrozenInputMethod(ProtectingMethod, AdapterMethod):
    """LoRA with an input factor that is chosen per task outside the memory, and frozen; the output factor trains."""

    frozen_inputs = True

    @abstractmethod
    def input_statistics(self, model: nn.Module, layers: Mapping[str, nn.Module], stage: Stage) -> Mapping[str, Any]:
        """Per layer, the statistic from which `input_factor` chooses."""

    @abstractmethod
    def input_factor(self, statistic: Any, protected: ProtectedSubspace, like: Tensor) -> Tensor:
        """The input factor (n, r) of one layer, outside ``protected``, with precision and device of ``like``."""

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters with frozen input factors and zero output factors."""
        layers = target_linears(model, stage.targets)
        memory = self.open_memory(layers)
        statistics = self.input_statistics(model, layers, stage)
        for name, adapter in self.inject_lora(model, stage).items():
            with torch.no_grad():
                adapter.right.copy_(self.input_factor(statistics[name], memory[name], adapter.right))
            adapter.right.requires_grad_(False)


@dataclass
class FrameMethod(AdapterMethod):
    """Orthonormal frames and a core per layer, which start along the task's gradient and train on their manifolds.

    Its options are described at `EBLoRA`.
    """

    core: ClassVar[Core] = "scalar"
    searched: ClassVar[Mapping[str, float]] = {}
    """Step or spectral direction → the searched rate of the frames, which the default of ``lr`` stands for."""

    lr: float = option(cast(float, None), unless_none(validate_positive))
    scale_lr: float = option(1e-2, validate_positive)
    initial_scale: float = option(-0.05, validate_number)
    initial_scale_last: float | None = option(None, unless_none(validate_number))
    scale_decay: float = option(0.0, partial(validate_number, least=0.0))
    statistic_examples: int = option(160, validate_whole)
    start_examples: int | None = option(None, unless_none(validate_whole))
    step: Literal["corrected", "official", "spectral"] = option("corrected", one_of(*STEPS))
    direction: str | None = option(None, unless_none(one_of(*DIRECTIONS)))

    def __post_init__(self) -> None:
        """Validate the options, and choose the direction and the rate of the step where they are not given."""
        super().__post_init__()
        if self.step == "spectral":
            self.direction = self.direction or DIRECTIONS[0]
        elif self.direction is not None:
            raise ValueError(
                f"direction={self.direction!r} is an option of step='spectral', and the step is {self.step!r}: "
                "set step='spectral', or leave direction out"
            )
        if self.lr is None:
            rate = self.searched.get(self.direction or "corrected")
            if rate is None:
                raise ValueError(
                    f"lr is missing: no rate was searched for step='spectral', direction={self.direction!r}, and those "
                    "of other steps have another unit; set lr to the spectral length of a step, such as 0.02"
                )
            self.lr = rate

    def open_memory(self, layers: Mapping[str, nn.Module]) -> SubspaceMemory:
        """The subspaces that the input frames avoid; empty by default."""
        return SubspaceMemory.empty(layers)

    def statistics_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which statistics are taken."""
        return nullcontext()

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject adapters that start in their `starting_directions`, outside the memory."""
        layers = target_linears(model, stage.targets)
        memory = self.open_memory(layers)
        starts = self.starting_directions(model, stage, layers, memory)
        scales, draw = self._initial_scales(list(layers)), stage.generator("adapters")
        options: dict[str, Any] = {"core": self.core, "alpha": self.alpha, "generator": draw}

        def make(name: str, layer: nn.Module) -> EBLoRALinear:
            return EBLoRALinear(layer, self.rank, complement=memory[name], initial_scale=scales[name], **options)

        for name, adapter in inject_adapters(model, stage.targets, make).items():
            assert isinstance(adapter, EBLoRALinear)
            if starts:
                adapter.point_along(starts[name].left, starts[name].right)

    def starting_directions(
        self, model: nn.Module, stage: Stage, layers: Mapping[str, nn.Module], memory: SubspaceMemory
    ) -> Mapping[str, SingularTriplets]:
        """Per layer, the leading directions of the task's gradient outside the memory; empty for random frames."""
        examples = self.statistic_examples if self.start_examples is None else self.start_examples
        losses, passes = stage.losses(model, examples, "start"), Passes(seed=stage.derive_seed("sketch"))
        with self.statistics_model(model):
            return leading_directions(layers, losses, self.rank, memory, passes=passes)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """`RiemannianAdamW` over frames and magnitudes; `RiemannianMuon` for the spectral step."""
        groups = param_groups(model, lr=self.lr, scale_lr=self.scale_lr)
        for group in groups:
            if group["role"] == "scales":
                group["weight_decay"] = self.scale_decay
        if self.step == "spectral":
            return cast(Optimizer, RiemannianMuon(groups, lr=self.lr, momentum=0.95, direction=self.direction))
        return cast(Optimizer, RiemannianAdamW(groups, lr=self.lr, weight_decay=0.0, step_rule=self.step))

    def _initial_scales(self, names: Sequence[str]) -> dict[str, float]:
        """``first + (last − first) l / (L − 1)`` for the layers of block l of L."""
        first, last = self.initial_scale, self.initial_scale_last
        if last is None:
            return dict.fromkeys(names, first)
        blocks = block_indices(names)
        deepest = max(*blocks.values(), 1)
        return {name: first + (last - first) * block / deepest for name, block in blocks.items()}


def block_indices(names: Sequence[str]) -> dict[str, int]:
    """Layer → the index of its block, the first number in its name; 0 for a name without one."""
    return {name: next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in names}
