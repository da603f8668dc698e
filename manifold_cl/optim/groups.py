"""Parameter groups: the points, magnitudes and other parameters of a model, and the manifold of each point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.point_holders import Slot, any_layers, held_slots
from manifold_cl.geometry.points import ConstraintResiduals
from manifold_cl.geometry.restricted_stiefel import kind_of
from manifold_cl.layouts import is_dtensor
from manifold_cl.optim.distributed import Owners, measure_gradients, sharding_groups
from manifold_cl.optim.validation import (
    Group,
    rate_of,
    validate_before_step,
    validate_distinct,
    validate_not_flattened,
    validate_point,
    validate_rate,
)
from manifold_cl.rules import described, validate_kind


@runtime_checkable
class OnManifolds(Protocol):
    """A module that lists which of its own parameters lie on which manifold."""

    def manifold_parameters(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        """Yield (name, parameter, manifold), children not included."""
        ...

    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of magnitudes, which train at a rate of their own without decay."""
        ...


def param_groups(
    model: nn.Module, *, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[Group]:
    """Parameter groups of a model with adapters: points, scales, and all other trainable parameters.

    Every group has its ``role`` and its ``manifold`` as strings. The group of points also lists its ``manifolds``,
    which a Riemannian optimizer takes out.

    Args:
        model: modules that follow `OnManifolds`, as our adapters do, list their points and scales. Wrap the model
            (DDP, ``fully_shard``) first: engines replace parameters.
        lr: for points and for other parameters.
        scale_lr: for magnitudes; ``lr`` if not given.
        weight_decay: for other trainable matrices; points and scales have none (on a point it would do nothing).

    Raises:
        ValueError: for a model without trainable parameters, one whose parameters an engine has flattened, or adapters
            with ``start="task"`` that have no start yet; a rate below 0 or not finite; ``scale_lr`` without adapters.
        TypeError: for a rate that is no number, such as a text of a YAML file, or parameters in place of the model.
    """
    validate_kind("model", model, nn.Module, remedy="give the model with its adapters, param_groups(model, lr=...)")
    for name, rate in (("lr", lr), ("scale_lr", scale_lr), ("weight_decay", weight_decay)):
        validate_rate(name, rate)
    for p in model.parameters():
        validate_not_flattened(p)
    points: list[tuple[nn.Parameter, Any]] = []
    scales: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, OnManifolds):
            if (validate := getattr(module, "validate_started", None)) is not None:
                validate()
            points += [(p, manifold) for _, p, manifold in module.manifold_parameters() if p.requires_grad]
            scales += [p for _, p in module.scale_parameters() if p.requires_grad]
    listed = {id(p) for p, _ in points}
    own = [(p, getattr(p, "manifold", None)) for p in model.parameters() if p.requires_grad and id(p) not in listed]
    points += [(p, manifold) for p, manifold in own if manifold is not None and kind_of(manifold) != "Euclidean"]
    taken = {id(p) for p, _ in points} | {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    by_kind: dict[str, list[tuple[nn.Parameter, Any]]] = {RestrictedStiefel.name: []}
    for p, manifold in points:
        by_kind.setdefault(kind_of(manifold), []).append((p, manifold))
    groups: list[Group] = []
    for kind, pairs in by_kind.items():
        params, manifolds = [p for p, _ in pairs], [manifold for _, manifold in pairs]
        group = {"params": params, "manifolds": manifolds, "manifold": kind, "role": "points"}
        groups.append({**group, "lr": lr, "weight_decay": 0.0})
    groups += [
        {"params": scales, "role": "scales", "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "role": "decay", "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "role": "no_decay", "lr": lr, "weight_decay": 0.0},
    ]
    if scale_lr is not None and not points and not scales:
        raise ValueError(
            f"scale_lr={scale_lr:g} is the rate of magnitudes, and the model has no adapters: call inject_adapters "
            "before param_groups, or leave scale_lr out"
        )
    groups = [{"manifold": "euclidean", **group} for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameters: inject adapters first, or unfreeze something")
    return groups


class Points:
    """The points among an optimizer's parameters, each with the manifold that it lies on."""

    def __init__(self) -> None:
        self.manifolds: dict[Tensor, Any] = {}
        self._slots: dict[Tensor, Slot] = {}
        self._params: list[Tensor] = []

    def within(self, groups: Sequence[Group]) -> list[Tensor]:
        """The points in these groups."""
        return [p for group in groups for p in group["params"] if p in self.manifolds]

    def follow(self, groups: Sequence[Group]) -> bool:
        """Find points among new parameters, and manifolds replaced in layers or points; whether there are such.

        O(1) per parameter where nothing changed.
        """
        params = [p for group in groups for p in group["params"]]
        if len(params) != len(self._params) or any(p is not q for p, q in zip(params, self._params, strict=True)):
            self._params = params
            live = held_slots()
            for p in params:
                slot = live.get(p) or self._own_slot(p)
                if slot is not None and self.manifolds.get(p, slot.manifold) is slot.manifold:
                    self._slots[p] = slot  # a manifold that the caller chose otherwise stays
                elif p not in self.manifolds and any_layers():
                    validate_not_flattened(p)
            self._slots = {p: self._slots[p] for p in params if p in self._slots}
        replaced = [(p, slot) for p, slot in self._slots.items() if self.manifolds.get(p) is not slot.manifold]
        for p, slot in replaced:
            validate_point(p, slot.manifold)
            self.manifolds[p] = slot.manifold
        return bool(replaced)

    def _own_slot(self, p: Tensor) -> Slot | None:
        """The place of the manifold that a point holds itself, as a ``geoopt.ManifoldParameter`` does."""
        return Slot(p, vars(p), "manifold") if p in self.manifolds and "manifold" in vars(p) else None

    def measure_gradients(self, groups: Sequence[Group], owners: Owners | None) -> tuple[list[Tensor], bool]:
        """The points whose gradient is not finite, on any rank, and whether another gradient is very large."""
        rated = [(p, rate) for group in groups for rate in [rate_of(group) or 1.0] for p in self.within([group])]
        points, rates = [p for p, _ in rated], [rate for _, rate in rated]
        for p in points:
            validate_before_step(p, self.manifolds[p])
        return measure_gradients(points, rates, sharding_groups(points) + ([] if owners is None else [owners.group]))

    def constraint_error(self, groups: Sequence[Group]) -> ConstraintResiduals:
        """The largest errors of all points on restricted Stiefel manifolds; NaN where a point holds one."""
        worst = ConstraintResiduals(0.0, 0.0)
        for p in self.within(groups):
            manifold = self.manifolds[p]
            if hasattr(manifold, "constraint_error"):
                complete = p.full_tensor() if is_dtensor(p) else p  # type: ignore[attr-defined]
                errors = zip(manifold.constraint_error(complete), worst, strict=True)
                worst = ConstraintResiduals(*(a if a != a or a > b else b for a, b in errors))
        return worst

    def __getstate__(self) -> dict[str, Any]:
        """The manifolds; layers are searched again at the next step."""
        return {"manifolds": self.manifolds, "_slots": {}, "_params": []}


def take_points(group: Group) -> dict[Tensor, Any]:
    """The points of a new group, with their manifolds; removes ``manifolds`` from the group and lists ``params``.

    Manifolds that the group does not give are those that layers and parameters hold themselves.

    Raises:
        ValueError: for a missing manifold, a parameter that is listed twice or does not fit its manifold.
        TypeError: for a set of parameters, and for half-precision points.
    """
    manifolds: Sequence[Any] | None = group.pop("manifolds", None)
    kind = group.get("manifold", "euclidean")
    if isinstance(group["params"], set):
        raise TypeError("parameters need an order that every run repeats, which a set does not have: pass a list")
    group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    validate_distinct(params)
    if manifolds is None:
        live: Mapping[Tensor, Slot] = held_slots() if kind in ("euclidean", "") else {}
        manifolds = [live[p].manifold if p in live else getattr(p, "manifold", None) for p in params]
    if not hasattr(manifolds, "__len__"):
        raise TypeError(
            f"manifolds is a list, one per parameter, got {described(manifolds)}: give manifolds=[manifold]"
        )
    if len(manifolds) != len(params):
        raise ValueError(f"a group has {len(params)} parameters and {len(manifolds)} manifolds: they run parallel")
    points: dict[Tensor, Any] = {}
    for p, manifold in zip(params, manifolds, strict=True):
        if manifold is not None and kind_of(manifold) != "Euclidean":
            validate_point(p, manifold)
            points[p] = manifold
        elif kind not in ("euclidean", ""):
            raise ValueError(
                f"the group is marked manifold={kind!r} but the manifold of a parameter of shape "
                f"{tuple(p.shape)} is missing: build the groups with param_groups(model), or give manifolds=[...], one "
                "per parameter"
            )
    return points
