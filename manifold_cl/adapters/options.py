"""Options of the adapter layers: names, defaults and validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.geometry import ProtectedSubspace, RestrictedStiefel, Retraction
from manifold_cl.rules import validate_kind, validate_number, validate_share, validate_whole

Core = Literal["scalar", "diagonal", "full"]
Start = Literal["random", "pretrained", "task"]
Protected = Tensor | ProtectedSubspace | None


@dataclass(frozen=True, kw_only=True)
class EBLoRAOptions:
    """Options of an EBLoRA adapter beside its rank, for `EBLoRALinear` and for PEFT's ``EBLoraConfig``.

    Args:
        core: ``"scalar"`` (balanced spectrum), ``"diagonal"`` or ``"full"``.
        initial_scale: s at the start. Negative, with `EBLoRALinear.point_along` a gradient, it is a descent step.
        alpha: numerator of the scaling alpha / r; the rank if None, so that the scaling is 1.
        start: of the frames: ``"random"``, or ``"pretrained"`` for the leading singular vectors of the weight outside
            the protected subspaces. ``"task"`` is random until `start_from_task` points them along a task's gradient;
            `param_groups` refuses to train before that.
        compensate: subtract the start, so that a new adapter changes nothing. The start is kept as frozen factors; the
            update then has rank 2r and costs twice as much.
        dropout: share of the adapter's inputs that are zeroed in training, in [0, 1).
        retraction: of both frames; the metric's own if None (``"polar"``, ``"cayley"``).
        metric: of both manifolds, ``"euclidean"`` or ``"canonical"``.

    Raises:
        ValueError: for an unknown name or a number out of range.

    >>> EBLoRAOptions(core="full").initial_scale
    -0.005
    """

    core: Core = "scalar"
    initial_scale: float = -0.005
    alpha: float | None = None
    start: Start = "random"
    compensate: bool = False
    dropout: float = 0.0
    retraction: Retraction | str | Callable[[Tensor, Tensor], Tensor] | None = None
    metric: Literal["euclidean", "canonical"] = "euclidean"

    def __post_init__(self) -> None:
        _validate_name("core", self.core, get_args(Core))
        _validate_name("start", self.start, get_args(Start))
        validate_scaling(self.alpha, self.dropout)
        scale: Any = self.initial_scale
        validate_number("initial_scale", scale.item() if isinstance(scale, Tensor) and not scale.ndim else scale)
        self.manifold()

    def manifold(self, protected: Protected = None) -> RestrictedStiefel:
        """The manifold of a frame outside ``protected``."""
        return RestrictedStiefel(protected, retraction=self.retraction, metric=self.metric)

    def initial_core(self, rank: int, *, device: torch.device | None = None) -> Tensor:
        """``initial_scale`` times the identity, float32, in the shape of the core: (), (r,) or (r, r)."""
        scale: dict[str, Any] = {"dtype": torch.float32, "device": device}
        if self.core == "scalar":
            return torch.tensor(float(self.initial_scale), **scale)
        if self.core == "diagonal":
            return torch.full((rank,), float(self.initial_scale), **scale)
        return float(self.initial_scale) * torch.eye(rank, **scale)


def validate_memory(name: str, memory: Any) -> None:
    """Raise TypeError for a memory that is no mapping from layer names to what they protect."""
    remedy = "give a SubspaceMemory (SubspaceMemory.load(folder) reads one) or a dict from layer names to bases"
    validate_kind(name, memory, Mapping, remedy=remedy)


def validate_scaling(alpha: float | None, dropout: float) -> None:
    """Raise ValueError for an alpha that is 0 or not finite, or a dropout outside [0, 1)."""
    if alpha is not None:
        validate_number("alpha", alpha)
        if alpha == 0:
            raise ValueError("alpha is 0: the adapter could not change any output; leave it out for a scaling of 1")
    validate_share("dropout", dropout, zero=True, one=False)


def validate_rank(base: nn.Module, rank: int, name: str = "") -> None:
    """Raise ValueError for a rank that the weight of layer ``name`` cannot have, TypeError for no whole number."""
    validate_whole("rank", rank, least=0)
    if not 1 <= rank <= min(sides(base)):
        layer = f"{name}: " if name else ""
        choice = f"choose 1 to {min(sides(base))}"
        raise ValueError(f"{layer}rank {rank} does not fit a weight of shape {sides(base)}: {choice}")


def _validate_name(option: str, name: str, names: tuple[str, ...], hint: str = "") -> None:
    if name not in names:
        raise ValueError(f"{option} is one of {', '.join(names)}, got {name!r}{hint}")
