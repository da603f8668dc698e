"""A weak registry of the modules that own points, from which optimizers get the manifold of a parameter.

An attribute of a parameter is lost in conversions, copies and sharding, which replace the parameter but not its module.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Slot(NamedTuple):
    """A point, and where its module keeps its manifold (the module may replace it)."""

    parameter: Tensor
    modules: Mapping[str, nn.Module | None]
    key: str

    @property
    def manifold(self) -> Any:
        """The manifold at present."""
        return self.modules[self.key]


@runtime_checkable
class PointHolder(Protocol):
    """A layer that owns points."""

    def held_points(self) -> Iterator[Slot]:
        """All points, including those of inactive adapters."""


_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
_handles: list[Any] = []
_entered = [0]
"""Number of registrations: an optimizer without points may have points after the next one."""
_without_points: weakref.WeakKeyDictionary[Optimizer, tuple[int, list[Tensor]]] = weakref.WeakKeyDictionary()


def enter_layer(layer: PointHolder) -> None:
    """Register a layer, at the end of its construction and after it was copied or unpickled."""
    _layers.add(layer)
    _guard()


def enter_optimizer(optimizer: Any) -> None:
    """Register a Riemannian optimizer; no ordinary optimizer may step its ``held_parameters()``."""
    _optimizers.add(optimizer)
    _guard()


def held_slots() -> dict[Tensor, Slot]:
    """The points of all layers that are alive. Microseconds per layer."""
    return {slot.parameter: slot for layer in list(_layers) for slot in layer.held_points()}


def any_layers() -> bool:
    """Whether a layer with points is alive."""
    return len(_layers) > 0


def keeps_manifolds(optimizer: Optimizer) -> bool:
    """Whether an optimizer may step points: a Riemannian one, or one whose attribute of this name is true."""
    if getattr(optimizer, "keeps_manifolds", False):
        return True
    inner = getattr(optimizer, "optim", None)  # torch's ZeroRedundancyOptimizer wraps another optimizer
    return type(optimizer).__module__.startswith("torch.distributed.") and getattr(inner, "keeps_manifolds", False)


def refuse_ordinary_step(optimizer: Optimizer, *_: Any) -> None:
    """Raise ValueError, before the step, for an optimizer that would step points as ordinary matrices."""
    if torch.compiler.is_compiling() or not (len(_layers) or len(_optimizers)) or keeps_manifolds(optimizer):
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    when, which = _without_points.get(optimizer, (-1, []))
    if when == _entered[0] and len(which) == len(params) and all(map(operator.is_, which, params)):
        return
    points = {id(slot.parameter) for layer in list(_layers) for slot in layer.held_points()}
    points.update(id(p) for other in list(_optimizers) for p in other.held_parameters())
    theirs = isinstance(optimizer, OptimMixin)  # geoopt's optimizers step parameters on their own manifold
    held = [p for p in params if id(p) in points and not (theirs and hasattr(p, "manifold"))]
    if not held:
        _without_points[optimizer] = (_entered[0], params)
    if moved := [p for p in held if p.grad is not None]:
        name = type(optimizer).__name__
        ours = f", or riemannian({name})" if type(optimizer).__module__.startswith("torch.optim") else ""
        raise ValueError(
            f"{name} would move {len(moved)} frames off their manifolds, the first of shape "
            f"{tuple(moved[0].shape)}: it is not Riemannian. Use RiemannianAdamW(param_groups(model, lr=...)){ours}; "
            "in transformers' Trainer optimizer_cls_and_kwargs=(TrainerOptimizer, {'lr': ...}). For an optimizer that "
            "keeps frames on their manifolds itself, set optimizer.keeps_manifolds = True"
        )


def _guard() -> None:
    """Validate every step of every torch optimizer, once the first point exists."""
    _entered[0] += 1
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(refuse_ordinary_step))
