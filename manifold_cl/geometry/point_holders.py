"""Modules that hold points: known while they live, so that an optimizer finds the manifold of a bare parameter.

A mark on a parameter is lost in conversions, copies and sharding, which replace it. The module that owns it stays.
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
    """A point, and the place where its owner keeps its manifold, which the owner may replace."""

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
        """All points, those of inactive adapters included."""
        ...


_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
_handles: list[Any] = []
_entered = [0]
"""How often something entered: what was found without points before may have some now."""
_without_points: weakref.WeakKeyDictionary[Optimizer, tuple[int, list[Tensor]]] = weakref.WeakKeyDictionary()


def enter_layer(layer: PointHolder) -> None:
    """Make a layer known, at the end of its construction and after it was copied or unpickled."""
    _layers.add(layer)
    _guard()


def enter_optimizer(optimizer: Any) -> None:
    """Make a Riemannian optimizer known: no ordinary one may step its ``held_parameters()``, as a wrapper would."""
    _optimizers.add(optimizer)
    _guard()


def held_slots() -> dict[Tensor, Slot]:
    """The points of all layers that are alive. O(number of layers), microseconds each."""
    return {slot.parameter: slot for layer in list(_layers) for slot in layer.held_points()}


def any_layers() -> bool:
    """Whether a layer with points is alive."""
    return len(_layers) > 0


def keeps_manifolds(optimizer: Optimizer) -> bool:
    """Whether an optimizer may step points: Riemannian ones, and others that say so by an attribute of this name."""
    if getattr(optimizer, "keeps_manifolds", False):
        return True
    inner = getattr(optimizer, "optim", None)  # torch's ZeroRedundancyOptimizer steps by another one, and broadcasts
    return type(optimizer).__module__.startswith("torch.distributed.") and getattr(inner, "keeps_manifolds", False)


def refuse_ordinary_step(optimizer: Optimizer, *_: Any) -> None:
    """Refuse, before anything moves, an optimizer that would step points as ordinary matrices.

    Raises:
        ValueError: naming the optimizer's class and what to use.
    """
    if torch.compiler.is_compiling() or not (len(_layers) or len(_optimizers)) or keeps_manifolds(optimizer):
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    when, which = _without_points.get(optimizer, (-1, []))
    if when == _entered[0] and len(which) == len(params) and all(map(operator.is_, which, params)):
        return
    points = {id(slot.parameter) for layer in list(_layers) for slot in layer.held_points()}
    points.update(id(p) for other in list(_optimizers) for p in other.held_parameters())
    theirs = isinstance(optimizer, OptimMixin)  # geoopt's own step parameters on the manifold that they carry
    held = [p for p in params if id(p) in points and not (theirs and hasattr(p, "manifold"))]
    if not held:
        _without_points[optimizer] = (_entered[0], params)
    if found := [p for p in held if p.grad is not None]:
        name = type(optimizer).__name__
        ours = f", or riemannian({name})" if type(optimizer).__module__.startswith("torch.optim") else ""
        raise ValueError(
            f"{name} would move {len(found)} frames off their manifolds, the first of shape "
            f"{tuple(found[0].shape)}: it is not Riemannian. Use RiemannianAdamW(param_groups(model, lr=...)){ours}; "
            "in transformers' Trainer optimizer_cls_and_kwargs=(TrainerOptimizer, {'lr': ...}). An optimizer that "
            "keeps frames on their manifolds itself says so: optimizer.keeps_manifolds = True"
        )


def _guard() -> None:
    """Have every step of every torch optimizer looked at, from the first point on."""
    _entered[0] += 1
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(refuse_ordinary_step))
