"""EBLoRA, balanced spectra on the restricted Stiefel manifold, and the two ablations that separate its ingredients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn

from manifold_cl.adapters import read_adapters
from manifold_cl.adapters.layers import target_linears
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual.method import state_field
from manifold_cl.continual.methods.bases import FrameMethod, ProtectingMethod
from manifold_cl.continual.ranks import Ranks
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.subspaces import Passes, TrainingStatistics, parse_sources, without_updates
from manifold_cl.continual.validation import one_of, option, unless_none
from manifold_cl.rules import validate_share, validate_whole


@dataclass
class EBLoRA(ProtectingMethod, FrameMethod):
    """One magnitude and two orthonormal frames per layer, the input frame orthogonal to the protected directions.

    Each task starts from the leading directions of its own gradient outside the memory and trains with
    `RiemannianAdamW`, or with `RiemannianMuon`. It is then merged, and the memory grows by the energy rule.

    Source: gu2026eblora; docs/method.md, "One task" and "The memory". The defaults won on the validation
    stream (docs/choosing.md, "The table of rates").

    Args:
        rank: r.
        alpha: numerator of the scaling alpha / r.
        lr: of the frames: AdamW's rate, or the spectral length of a step, in radians, with ``step="spectral"``. None
            for the rate that was searched for this step; an error where none was.
        scale_lr: of the magnitudes.
        initial_scale: s at the start of a task; a negative s is a descent step along the gradient.
        initial_scale_last: s in the last block. From there it runs linearly in depth to ``initial_scale`` in the
            first block; None for the same s everywhere. The block is the first number in a layer's name.
        scale_decay: weight decay of the magnitudes.
        statistic_examples: training examples for the start and the memory.
        start_examples: those for the start alone, if given.
        step: ``"corrected"``; ``"official"`` as released (docs/deviations.md, "The step", deviations 1 and 2);
            ``"spectral"``, steepest descent under the spectral norm with momentum 0.95. Magnitudes step as in AdamW.
        direction: of the spectral step, ``"exact"`` if not given, or ``"spel"``, ``"projected"``, ``"intrinsic"``
            (docs/optimizers.md, "Spectral steps").
        energy: share of each task's energy that the memory must hold, in (0, 1].
        source: what the memory protects: ``"gradient"`` (directions of the mean), ``"activation"`` (inputs),
            ``"sensitivity"`` (inputs weighted by their loss gradient), or a union such as ``"activation+gradient"``.
        statistics_at: the model for the statistics: ``"merged"``, or ``"pretrained"`` as released (deviation 14).
        from_weights: share of the pre-trained weights' energy that is protected from the start; 0 for none.
        policy: for full layers: ``"stop"``, ``"evict"`` or ``"raise"``.
        shared_inputs: one statistic and one basis for layers that receive the same input (docs/subspaces.md, "Shared
            inputs").
        compact_memory: protected columns in six bits per entry (docs/subspaces.md, "On disk").
        statistics_during: share of the last training steps in which the memory's statistic is collected, instead of in
            a pass after training; 0 for the pass (docs/subspaces.md, "Without a pass of its own").
    """

    name = "eblora"
    searched = MappingProxyType({"corrected": 6e-3, "exact": 3e-2, "spel": 3e-2, "projected": 7e-2, "intrinsic": 5e-2})

    scale_lr: float = 2e-2
    source: str = option("sensitivity", lambda _, source: parse_sources(source))
    statistics_at: Literal["merged", "pretrained"] = option("merged", one_of("merged", "pretrained"))
    from_weights: float = option(0.0, partial(validate_share, zero=True, one=False))
    policy: Literal["stop", "evict", "raise"] = option("stop", one_of("stop", "evict", "raise"))
    shared_inputs: bool = False
    compact_memory: bool = False
    statistics_during: float = option(0.0, partial(validate_share, zero=True))
    updates: list[dict[str, Factors]] = state_field(list)
    """The merged updates, kept for statistics at the pre-trained model only."""

    _during: TrainingStatistics | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the options together."""
        super().__post_init__()
        if self.statistics_during and (self.statistics_at != "merged" or "+" in self.source):
            raise ValueError(
                f"statistics_during={self.statistics_during} collects one source at the model that trains, got "
                f"source={self.source!r} and statistics_at={self.statistics_at!r}: set statistics_during=0"
            )
        if self.shared_inputs and parse_sources(self.source) == ("gradient",):
            raise ValueError(
                "shared_inputs=True has no effect with source='gradient', which is measured per layer: leave it out, "
                "or choose the source sensitivity or activation"
            )

    def statistics_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the model is the one of ``statistics_at``."""
        return without_updates(model, self.updates)

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """As `FrameMethod`, and delete what an interrupted task collected."""
        self._during = None
        super().begin_task(model, stage)

    def step_context(self, model: nn.Module, stage: Stage, step: int, steps: int) -> AbstractContextManager[None]:
        """A context that collects the memory's statistic in the last steps, with ``statistics_during``."""
        if not self.collects(step, steps):
            return nullcontext()
        if self._during is None:
            passes = Passes(
                seed=stage.derive_seed("memory sketch"),
                shared_inputs=self.shared_inputs,
                distributed=Ranks.current().count > 1,  # each rank trains on its own share
            )
            (source,) = parse_sources(self.source)
            layers = target_linears(model, stage.targets)
            self._during = TrainingStatistics(layers, source=source, energy=self.threshold(stage), passes=passes)
        return self._during.collecting()

    def collects(self, step: int, steps: int) -> bool:
        """Whether this step is one of the last, in which ``statistics_during`` collects."""
        return self.statistics_during > 0 and step > steps - max(1, round(self.statistics_during * steps))

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Merge, then let the memory grow by the protected directions of this task."""
        update = self.merge(model)
        if self.statistics_at == "pretrained":
            self.updates.append(update)
        if self._during is None:
            with self.statistics_model(model):
                self.grow_memory(model, stage, policy=self.policy)
        assert self.memory is not None
        if self._during is not None:
            self.memory = self.memory.extended(
                self._during.importances(),
                energy=self.threshold(stage),
                rank=self.rank,
                policy=self.policy,
                task=stage.task.name,
            )
            self._during = None
        self.memory = self.memory.with_model(model, target_linears(model, stage.targets))

    def _restore_state(self, model: nn.Module, folders: Sequence[Path]) -> None:
        super()._restore_state(model, folders)
        self.updates = [read_adapters(f) for f in folders] if self.statistics_at == "pretrained" else []

    def state(self) -> Iterator[Tensor]:
        """The protected bases, and the kept updates."""
        yield from super().state()
        for update in self.updates:
            for factors in update.values():
                yield from (factors.left, factors.right, factors.magnitude)


@dataclass
class Best(EBLoRA):
    """`EBLoRA` at a fraction of its additional cost: fewer examples for the start, no pass for the memory.

    The start takes 32 examples. The memory's statistic is collected in the last thirtieth of the training steps, and
    holds 99 % of its energy, since so few tokens show fewer directions. It ends level with `EBLoRA` in a search on
    validation tasks: a preset for less time, and no method of higher accuracy
    (docs/decisions/0032-best-is-the-cheaper-one.md).
    """

    name = "best"

    energy: float = option(0.99, validate_share)
    start_examples: int | None = option(32, unless_none(validate_whole))
    statistics_during: float = option(0.034, partial(validate_share, zero=True))


@dataclass
class Balanced(FrameMethod):
    """`EBLoRA` without a memory: one magnitude and orthonormal frames per layer, nothing protected."""

    name = "balanced"
    searched = MappingProxyType({"corrected": 3e-3})


@dataclass
class Restricted(EBLoRA):
    """`EBLoRA` with a full r × r core between its frames: the same protection, any spectrum."""

    name = "restricted"
    core = "full"
    searched = MappingProxyType({"corrected": 1.2e-2})

    scale_lr: float = 5e-3
