"""One step of a Riemannian optimizer: gradients made Riemannian, the base step, displacements retracted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.geometry.point_holders import Slot, any_layers, held_slots
from manifold_cl.geometry.points import ConstraintResiduals
from manifold_cl.optim.banks import SCALED
from manifold_cl.optim.base import BaseStep, put_back, vectors_of
from manifold_cl.optim.buckets import Bucket, Workspace
from manifold_cl.optim.gradients import inspect_gradients, refusal
from manifold_cl.optim.inputs import check_before_step, check_point, refuse_flags, refuse_flattened
from manifold_cl.optim.layout import is_dtensor
from manifold_cl.optim.options import Group, check_options, scale_of
from manifold_cl.optim.planning import Plan, elementwise
from manifold_cl.optim.sharing import Owners, groups_of
from manifold_cl.optim.snapshot import Snapshot
from manifold_cl.optim.swaps import forget_swaps


class Stepper:
    """All that a Riemannian optimizer has beside its base: the points with their manifolds, and how they step.

    One attribute of the optimizer holds it, so that no name hides one of the base class.

    Args:
        base: the class that was made Riemannian.
        options: defaults of the options of the step.
        owners: who works out which point, where ranks share the work.
        decay_asked: whether the caller asked for weight decay.
    """

    def __init__(
        self, base: type[Optimizer], options: Mapping[str, Any], owners: Owners | None = None, decay_asked: bool = False
    ) -> None:
        self.base, self.options, self.owners, self.decay_asked = base, dict(options), owners, decay_asked
        self.manifolds: dict[Tensor, Any] = {}
        self.slots: dict[Tensor, Slot] = {}
        self.known: list[Tensor] = []
        self.plan, self.workspace = Plan(), Workspace()
        self.elementwise = elementwise(base)
        self.stepping = False
        self.warned = False
        self.steps = self.skipped = 0

    def step(self, optimizer: Any) -> bool:
        """One step of all parameters that have a gradient. Whether it was taken; a skipped one is counted.

        Raises:
            ValueError, TypeError: see `RiemannianStep.step`.
        """
        self.follow(optimizer.param_groups)
        fit, large = self._admit(optimizer.param_groups)
        if not fit:
            self.skipped += 1
            return False
        before = Snapshot(optimizer) if large else None
        for group in optimizer.param_groups:
            if group["polish_every"]:
                group["steps"] = group.get("steps", 0) + 1
        plan = self.updated_plan(optimizer)
        self.stepping = True
        try:
            lost = (self._step_buckets if self.elementwise else self._step_at_once)(optimizer, plan)
        except BaseException:
            if before is not None:
                before.restore(optimizer)
            raise
        finally:
            self.stepping = False
        if lost:
            self._give_up(optimizer, lost, before)
            return False
        self.steps += 1
        return True

    # Two ways to run the base optimizer ---------------------------------------------------------

    def _step_buckets(self, optimizer: Any, plan: Plan) -> list[Tensor]:
        """One bucket after the other, each as one tensor: for bases that treat every entry alike.

        Nothing is written to a parameter before all points are computed. Returns the points that are not finite.
        """
        base = BaseStep(optimizer, self.base)
        lost: list[Tensor] = []
        moved: list[tuple[Bucket, Tensor]] = []
        for i, (group, bucket) in enumerate(plan.points):
            y, g = (self.workspace.take(slot, bucket.shape, bucket.locals[0]) for slot in (f"y{i}", "g"))
            bucket.gather(y)
            x = self.workspace.take("x", bucket.own_shape, y).copy_(y[bucket.part])
            self._gradients(group, bucket, x, g)
            base.run_on_bank(group, bucket, y, g)
            if _rate_is_zero(group):
                continue  # nothing moved, to the bit; a retraction would round
            bad = self._retract(group, bucket, x, y, vectors_of(bucket, optimizer.state) if _carries(group) else [])
            moved.append((bucket, y))
            lost += [bucket.parameters[j] for j in bad]
        if lost:
            return lost
        for group, params in plan.rest:
            base.run_on(group, params, **getattr(self.base, "OFF_MANIFOLDS", {}))
        for bucket, y in moved:
            bucket.scatter(y)
        return lost

    def _step_at_once(self, optimizer: Any, plan: Plan) -> list[Tensor]:
        """One ordinary step of the base optimizer on all parameters, whatever statistics it takes across them.

        Returns the points that are not finite; all parameters are then back where they were.
        """
        starts: list[Tensor] = []
        gradients: dict[Tensor, Tensor] = {}
        for i, (group, bucket) in enumerate(plan.points):
            x, g = (self.workspace.take(f"{slot}{i}", bucket.shape, bucket.locals[0]) for slot in "xg")
            bucket.gather(x)
            self._gradients(group, bucket, x[bucket.part], g)
            starts.append(x)
            gradients.update(zip(bucket.parameters, g.unbind(0), strict=True))
        frozen = [_rate_is_zero(group) for group, _ in plan.points]  # the base optimizer may write to rates
        resting = {p: p.detach().clone() for p in self.points(optimizer.param_groups) if p.grad is None}
        plain = {p: p.detach().clone() for p in self.known if p.grad is not None and p not in self.manifolds}
        lost: list[Tensor] = []
        try:
            BaseStep(optimizer, self.base).run_once(gradients, self.manifolds)
            forget_swaps(optimizer.state, list(gradients))
            for (group, bucket), x, still in zip(plan.points, starts, frozen, strict=True):
                bucket.refresh()
                if still:
                    bucket.scatter(x)
                else:
                    lost += self._retract_from(group, bucket, x, optimizer.state)
        except BaseException:
            self._undo(plan, starts, plain)
            raise
        else:
            if lost:
                self._undo(plan, starts, plain)
        finally:
            for p, x in resting.items():
                p.detach().copy_(x)  # a point without a gradient stays where it is
        return lost

    def _retract_from(self, group: Group, bucket: Bucket, x: Tensor, state: Mapping[Tensor, Any]) -> list[Tensor]:
        """Replace parameters, moved from x (B, …) by the base optimizer, by points; returns those not finite."""
        y = self.workspace.take("y", bucket.shape, x)
        bucket.gather(y)
        vectors = vectors_of(bucket, state) if _carries(group) else []
        bad = self._retract(group, bucket, x[bucket.part], y, vectors)
        bucket.scatter(y)
        if vectors:
            put_back(bucket, vectors, state)
        return [bucket.parameters[i] for i in bad]

    def _undo(self, plan: Plan, starts: Sequence[Tensor], plain: Mapping[Tensor, Tensor]) -> None:
        """Put the points with a gradient back to ``starts`` and the Euclidean parameters to their copies."""
        for (_, bucket), x in zip(plan.points, starts, strict=True):
            bucket.refresh()
            bucket.scatter(x)
        for p, before in plain.items():
            p.detach().copy_(before)

    # What both have in common ---------------------------------------------------------------------

    def _gradients(self, group: Group, bucket: Bucket, x: Tensor, g: Tensor) -> None:
        """Fill g (B, …) with the gradients that the base optimizer sees; x are the points of this rank's part."""
        if group["metric_pre"] == "none":
            bucket.gather_grads(g, slice(None))
            return
        own = g[bucket.part]
        bucket.gather_grads(own, bucket.part)
        if len(x):
            bucket.gradient_(x, own, self.workspace, metric=group["metric_pre"])
        self._share(g, bucket)

    def _retract(self, group: Group, bucket: Bucket, x: Tensor, y: Tensor, vectors: Sequence[Tensor]) -> list[int]:
        """Replace y (B, …), the base optimizer's result, by the points that the displacements y − x lead to.

        ``vectors`` are carried along. Returns the places of points that would not be finite.
        """
        d, moved = y[bucket.part], [v[bucket.part] for v in vectors]
        if len(x):
            d.sub_(x)
            if group["step_scale"] != "none":
                d.mul_(scale_of(group, *_sides(bucket.locals[0])))
            exact = not self.elementwise or _rate(group) is None
            still = (d == 0).reshape(len(d), -1).all(dim=1) if exact else None
            if infinite := bucket.places_not_finite(d) if bucket.refuses_nan else []:
                d[infinite] = 0
            if group["tangent_post"] == "double":
                bucket.double_(x, d, self.workspace)
            tangent = self.elementwise and self.base.__name__ not in SCALED and group["metric_pre"] != "none"
            bucket.move_(x, d, moved, self.workspace, tangent=tangent)
            if group["polish_every"] and group["steps"] % group["polish_every"] == 0:
                bucket.polish_(d)
            if infinite:
                d[infinite] = torch.nan
            if still is not None and bool(still.any()):
                d[still] = x[still]  # not moved, to the bit; a retraction would round
        for slab in (y, *vectors):
            self._share(slab, bucket)
        return bucket.places_not_finite(y)

    def _share(self, slab: Tensor, bucket: Bucket) -> None:
        if self.owners is not None and bucket.parts is not None:
            self.owners.share_(slab, bucket.parts)

    # Before and after -----------------------------------------------------------------------------

    def points(self, groups: Sequence[Group]) -> list[Tensor]:
        """The points in these groups."""
        return [p for group in groups for p in group["params"] if p in self.manifolds]

    def follow(self, groups: Sequence[Group]) -> None:
        """Find points among parameters that were put into a group, and manifolds that their layers have replaced.

        O(1) per parameter where nothing changed.
        """
        params = [p for group in groups for p in group["params"]]
        if len(params) != len(self.known) or any(p is not q for p, q in zip(params, self.known, strict=True)):
            self.known = params
            live = held_slots()
            for p in params:
                if (slot := live.get(p)) is not None and self.manifolds.get(p, slot.manifold) is slot.manifold:
                    self.slots[p] = slot  # a manifold that the caller chose otherwise stays
                elif p not in self.manifolds and any_layers():
                    refuse_flattened(p)
            self.slots = {p: self.slots[p] for p in params if p in self.slots}
        moved = [(p, slot) for p, slot in self.slots.items() if self.manifolds.get(p) is not slot.manifold]
        for p, slot in moved:
            check_point(p, slot.manifold)
            self.manifolds[p] = slot.manifold
        if moved:
            self.plan = Plan()  # its buckets stack the manifolds that were replaced

    def updated_plan(self, optimizer: Any) -> Plan:
        """What steps together, brought up to date."""
        self.follow(optimizer.param_groups)
        return self.plan.updated(optimizer.param_groups, self.manifolds, optimizer.state, self.base, self.owners)

    def _admit(self, groups: Sequence[Group]) -> tuple[bool, bool]:
        """Whether the gradients of the points are fit to step on, on all ranks, and whether one is very large."""
        points = self.points(groups)
        for group in groups:
            refuse_flags(group)
            check_options(group)
            if not math.isfinite(_rate(group) or 0.0):
                raise ValueError(f"lr is {group['lr']} in a group: nothing was changed; set a finite learning rate")
        for p in points:
            check_before_step(p, self.manifolds[p])
        rates = [_rate(group) or 1.0 for group in groups for p in group["params"] if p in self.manifolds]
        ranks = groups_of(points) + ([] if self.owners is None else [self.owners.group])
        bad, large = inspect_gradients(points, rates, ranks)
        if bad and _refuses(groups, bad):
            raise ValueError(refusal(bad, len(points)))
        return not bad, large

    def _give_up(self, optimizer: Any, lost: Sequence[Tensor], before: Snapshot | None) -> None:
        """Refuse or count a step that would have made points NaN or infinite."""
        if before is not None:
            before.restore(optimizer)
        if _refuses(optimizer.param_groups, lost):
            left = "nothing was changed" if before is not None else "no parameter has moved, only averages of gradients"
            raise ValueError(
                f"the step of {len(lost)} of {len(self.manifolds)} points is not finite, the first of shape "
                f"{tuple(lost[0].shape)}: {left}; lower lr, clip gradients, or pass nonfinite='skip'"
            )
        self.skipped += 1

    def constraint_error(self, groups: Sequence[Group]) -> ConstraintResiduals:
        """The largest errors of all points on restricted Stiefel manifolds; NaN where a point holds one."""
        self.follow(groups)
        worst = ConstraintResiduals(0.0, 0.0)
        for p in self.points(groups):
            manifold = self.manifolds[p]
            if hasattr(manifold, "constraint_error"):
                whole = p.full_tensor() if is_dtensor(p) else p  # type: ignore[attr-defined]
                errors = zip(manifold.constraint_error(whole), worst, strict=True)
                worst = ConstraintResiduals(*(a if a != a or a > b else b for a, b in errors))
        return worst

    def grad_norm(self, optimizer: Any) -> Tensor:
        """The norm of all gradients together, 0-d: Riemannian where a parameter is on a manifold."""
        plan = self.updated_plan(optimizer)
        total = torch.zeros((), dtype=torch.float64)
        for _, bucket in plan.points:
            x, g = (self.workspace.take(slot, bucket.own_shape, bucket.locals[0]) for slot in "xg")
            if len(x):
                bucket.gather_own(x)
                bucket.gather_grads(g, bucket.part)
                bucket.gradient_(x, g, self.workspace, metric="own")
                total += bucket.norm_squared(x, g).cpu()
        if self.owners is not None and self.manifolds:
            self.owners.add_(total, next(iter(self.manifolds)).device)
        for _, params in plan.rest:
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            total += (norm.full_tensor() if is_dtensor(norm) else norm).double().cpu() ** 2  # type: ignore[attr-defined]
        return total.sqrt()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what steps together and scratch memory, which are made anew."""
        if self.owners is not None:
            raise TypeError("an optimizer with a process_group cannot be copied or pickled: save its state_dict()")
        made_anew = {"plan": Plan(), "workspace": Workspace(), "slots": {}, "known": []}
        return {**vars(self), "decay_asked": False, **made_anew}


def _sides(point: Tensor) -> tuple[int, int]:
    """(n, p); a vector is one column."""
    n, p = (point.shape[0], 1) if point.ndim == 1 else point.shape[-2:]
    return n, p


def _carries(group: Group) -> bool:
    return bool(group["moments"] == "transport")


def _refuses(groups: Sequence[Group], points: Sequence[Tensor]) -> bool:
    ids = {id(p) for p in points}
    return any(group["nonfinite"] == "refuse" and ids & {id(p) for p in group["params"]} for group in groups)


def _rate(group: Group) -> float | None:
    """The learning rate, 1 for a base that works out its own; None where reading it would wait for a device."""
    lr = group.get("lr")
    if lr is None:
        return 1.0
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return None
    return float(lr)


def _rate_is_zero(group: Group) -> bool:
    return _rate(group) == 0
