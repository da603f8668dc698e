"""One method with core, restriction, start and norm as factors: separates the causes that named methods mix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_cl.adapters import EBLoRALinear, adapters_of
from manifold_cl.continual.methods.bases import FrameMethod
from manifold_cl.continual.methods.eblora import EBLoRA
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import SingularTriplets, SubspaceMemory
from manifold_cl.continual.validation import one_of, option, unless_none
from manifold_cl.rules import validate_positive

RISE = 0.5
"""Share of a task's steps in which the imposed norm rises linearly to its target."""


@dataclass
class Factorial(EBLoRA):
    """Orthonormal frames and a core per layer, with four factors that vary alone: core, restriction, start, norm.

    Three cells are other methods, bit for bit at the same options: `Balanced` (scalar, none, task), `EBLoRA` (scalar,
    input, task) and `Restricted` (full, input, task), all with a free norm. `StellaMerge` takes another step, so that
    no cell equals it. The default rate is that of `EBLoRA`; it was not searched for the other cells.

    Source: docs/decisions/0030-causes-are-set-not-observed.md. Its other options are described at `EBLoRA`.

    Args:
        core: ``"scalar"`` (equal singular values), ``"diagonal"`` or ``"full"``.
        restriction: ``"input"`` for input frames orthogonal to the protected directions, or ``"none"``.
        start: of the frames: ``"task"``, along the task's gradient, or ``"random"``.
        update_norm: Frobenius norm of each layer's update, the same in all layers and tasks; None for a free norm. It
            is imposed before every step: it rises linearly over the first half of the steps, and stays then. A scalar
            core keeps the sign of ``initial_scale``.
    """

    name = "factorial"

    lr: float = option(6e-3, validate_positive)
    core: Literal["scalar", "diagonal", "full"] = option("scalar", one_of("scalar", "diagonal", "full"))  # type: ignore[misc]
    restriction: Literal["none", "input"] = option("input", one_of("none", "input"))
    start: Literal["random", "task"] = option("task", one_of("random", "task"))
    update_norm: float | None = option(None, unless_none(validate_positive))

    def __post_init__(self) -> None:
        """Validate the options together."""
        super().__post_init__()
        if self.update_norm is not None and 0.0 in (self.initial_scale, self.initial_scale_last):
            raise ValueError(
                f"update_norm={self.update_norm} needs a core that is not zero at the start, got "
                f"initial_scale={self.initial_scale} and initial_scale_last={self.initial_scale_last}"
            )

    @property
    def protects(self) -> bool:
        """Whether input frames avoid a memory."""
        return self.restriction == "input"

    def open_memory(self, layers: Mapping[str, nn.Module]) -> SubspaceMemory:
        """The memory of earlier tasks; empty without a restriction."""
        return super().open_memory(layers) if self.protects else FrameMethod.open_memory(self, layers)

    def starting_directions(
        self, model: nn.Module, stage: Stage, layers: Mapping[str, nn.Module], memory: SubspaceMemory
    ) -> Mapping[str, SingularTriplets]:
        """Those of the task's gradient, or none: frames stay random then."""
        return super().starting_directions(model, stage, layers, memory) if self.start == "task" else {}

    def step_context(self, model: nn.Module, stage: Stage, step: int, steps: int) -> AbstractContextManager[None]:
        """As `EBLoRA`, after the norm of this step is imposed."""
        if self.update_norm is not None:
            self._impose(model, self.update_norm * min(1.0, step / (RISE * steps)))
        return super().step_context(model, stage, step, steps)

    def finish_task(self, model: nn.Module, stage: Stage) -> None:
        """Impose the norm on the trained update."""
        if self.update_norm is not None:
            self._impose(model, self.update_norm)

    def _impose(self, model: nn.Module, norm: float) -> None:
        impose_norm(model, norm, signs=self._initial_scales(list(adapters_of(model))))

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """As `EBLoRA`; without a restriction the update is merged and nothing is kept."""
        if self.protects:
            super().end_task(model, stage)
        else:
            FrameMethod.end_task(self, model, stage)

    def save_state(self, folder: Path, stage: Stage) -> None:
        """Write the memory, if there is one."""
        if self.protects:
            super().save_state(folder, stage)

    def load_state(self, folder: Path) -> None:
        """Read the memory, if there is one."""
        if self.protects:
            super().load_state(folder)

    def _restore_state(self, model: nn.Module, folders: Sequence[Path]) -> None:
        if self.protects:
            super()._restore_state(model, folders)

    def state(self) -> Iterator[Tensor]:
        """The protected bases; nothing without a restriction."""
        if self.protects:
            yield from super().state()


@torch.no_grad()
def impose_norm(model: nn.Module, norm: float, *, signs: Mapping[str, float] | None = None) -> None:
    """Scale the core of every adapter so that ``‖ΔW‖_F`` of its update is ``norm``.

    Frames are orthonormal, so that the norm is the core's times alpha / r: only the core changes. A scalar core takes
    the sign of its layer's entry in ``signs``: a step longer than the core would turn the update around otherwise.

    Raises:
        FloatingPointError: for a core that is zero or not finite, which no factor brings to a norm.

    >>> layer = nn.Sequential(EBLoRALinear(nn.Linear(6, 4), 2, core="diagonal", initial_scale=0.5))
    >>> impose_norm(layer, 3.0)
    >>> round(torch.linalg.matrix_norm(layer[0].factors().delta_weight()).item(), 4)
    3.0
    """
    for name, adapter in adapters_of(model).items():
        assert isinstance(adapter, EBLoRALinear)
        core: Any = adapter.magnitude().double()
        size = float(torch.linalg.vector_norm(core)) * (math.sqrt(adapter.rank) if core.ndim == 0 else 1.0)
        if not (math.isfinite(size) and size > 0):
            raise FloatingPointError(f"{name}: the core has the norm {size}, no factor brings it to {norm}")
        adapter.scale.mul_(norm / size)
        if core.ndim == 0 and signs is not None:
            adapter.scale.copy_(torch.copysign(adapter.scale, torch.tensor(signs[name])))
