"""Parameter groups: which parameters are points, which are magnitudes, and what else trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import nn

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.restricted_stiefel import kind_of
from manifold_cl.optim.inputs import refuse_flattened
from manifold_cl.optim.options import Group


@runtime_checkable
class OnManifolds(Protocol):
    """A module that can say which of its own parameters live on which manifold."""

    def manifold_parameters(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        """Yield (name, parameter, manifold), children not included."""
        ...

    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of magnitudes, which train at a rate of their own without decay."""
        ...


def param_groups(
    model: nn.Module, *, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[Group]:
    """Parameter groups of a model with adapters: points, scales, and whatever else is trainable.

    Every group carries its ``role`` and its ``manifold`` as strings. The group of points also lists its
    ``manifolds``; a Riemannian optimizer takes them out before the group is stored, so its state stays plain.

    Args:
        model: modules that follow `OnManifolds` (our adapters do) are asked for their points and scales. Wrap it
            (DDP, ``fully_shard``) first: engines replace parameters.
        lr: for points and for other parameters.
        scale_lr: for magnitudes; ``lr`` if not given.
        weight_decay: for other trainable matrices; points and scales have none (on a point it would do nothing).

    Raises:
        ValueError: for a model without trainable parameters, or one whose parameters an engine has flattened.
    """
    for p in model.parameters():
        refuse_flattened(p)
    points: list[tuple[nn.Parameter, Any]] = []
    scales: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, OnManifolds):
            points += [(p, manifold) for _, p, manifold in module.manifold_parameters() if p.requires_grad]
            scales += [p for _, p in module.scale_parameters() if p.requires_grad]
    asked = {id(p) for p, _ in points}
    own = [(p, getattr(p, "manifold", None)) for p in model.parameters() if p.requires_grad and id(p) not in asked]
    points += [(p, manifold) for p, manifold in own if manifold is not None and kind_of(manifold) != "Euclidean"]
    taken = {id(p) for p, _ in points} | {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    kinds = dict.fromkeys([RestrictedStiefel.name, *(kind_of(manifold) for _, manifold in points)])
    groups: list[Group] = [
        {
            "params": [p for p, manifold in points if kind_of(manifold) == kind],
            "manifolds": [manifold for _, manifold in points if kind_of(manifold) == kind],
            "manifold": kind,
            "role": "points",
            "lr": lr,
            "weight_decay": 0.0,
        }
        for kind in kinds
    ] + [
        {"params": scales, "role": "scales", "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "role": "decay", "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "role": "no_decay", "lr": lr, "weight_decay": 0.0},
    ]
    groups = [{"manifold": "euclidean", **group} for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameters: inject adapters first, or unfreeze something")
    return groups
