"""The step of one optimizer, in eight lines, on all its points; with questions to the host, or on the device alone."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.linalg import is_capturing
from manifold_cl.optim.base_step import BaseStep, is_elementwise, undone_on_failure, unmoved_where
from manifold_cl.optim.buckets import Bucket, Plan
from manifold_cl.optim.distributed import Owners
from manifold_cl.optim.groups import Points
from manifold_cl.optim.own_bases import OwnBase
from manifold_cl.optim.validation import Group, validate_groups

FAR = 1e-3
"""Constraint error of points before the first step that is worth a warning: what an average of weights or half
precision leaves. The step brings such points back, and the model is then another one than before."""


class NotFiniteError(Exception):
    """Raised inside a step for points that would not be finite, which undoes the step."""


class Stepper:
    """The points of one optimizer, and their step; ``options`` are for groups that do not give their own."""

    def __init__(self, base: type[Optimizer], options: Group, owners: Owners | None, *, decay_given: bool) -> None:
        self.base, self.options, self.owners, self.decay_given = base, options, owners, decay_given
        self.elementwise = is_elementwise(base)
        self.points, self.plan = Points(), Plan(base, owners)
        self.validated: list[list[Any]] = []
        self.stepping = self.warned = False
        self.steps = self.skipped = 0

    def step(self, optimizer: Any) -> bool:
        """Step all parameters that have a gradient. Whether that was done; a skipped step is counted."""
        groups: list[Group] = optimizer.param_groups
        self.follow(groups)
        self.validated = validate_groups(groups, self.base, self.validated)
        if is_capturing() or any(group.get("capturable") for group in groups):
            return self._step_on_device(optimizer)
        bad, large = self.points.measure_gradients(groups, self.owners)
        if bad:
            among = len(self.points.within(groups))
            problem = f"{len(bad)} of {among} points have NaN or infinite entries in their gradient"
            self._skip(groups, bad, problem, "nothing was changed; look at the loss, use a GradScaler")
            return False
        self.plan.update(groups, self.points.manifolds, optimizer.state)
        if not self.steps:
            self._warn_of_start(groups)
        self.stepping = True
        try:
            with undone_on_failure(optimizer, self.plan.copies(complete=large), completely=large):
                self._move_all(optimizer)
        except NotFiniteError as failure:
            (lost,) = failure.args
            problem = f"the step of {len(lost)} of {len(self.points.manifolds)} points is not finite"
            undone = "nothing was changed" if large else "no parameter has moved, only averages of gradients"
            self._skip(groups, lost, problem, f"{undone}; lower lr, clip gradients")
            return False
        finally:
            self.stepping = False
        self.steps += 1
        return True

    def _warn_of_start(self, groups: Sequence[Group]) -> None:
        """Warn of points that are far off their manifold before the first step, which moves them back."""
        worst = self.points.constraint_error(groups)
        if max(worst) > FAR:
            warnings.warn(
                f"points are off their manifold before the first step ({worst}), which moves them back, so that the "
                "model changes more than a step should: something initialised, averaged or rounded them. Make the "
                "adapters after that, or call retract_adapters(model) and look at the model first",
                UserWarning,
                stacklevel=4,
            )

    def _step_on_device(self, optimizer: Any) -> bool:
        """The step without a question to the host, as a CUDA graph records it.

        Where a number is not finite, no parameter moves. Averages of gradients then take a gradient of zero, and the
        step is counted on the device.
        """
        groups, plan, made = optimizer.param_groups, self.plan, self.plan.buckets
        plan.update(groups, self.points.manifolds, optimizer.state)
        self._validate_on_device(groups, made)
        if not (gradients := plan.gradients()):
            self.steps += 1
            return True
        bad = ~torch.stack(torch._foreach_norm(gradients)).sum().isfinite()
        base, moves = BaseStep(optimizer, self.base, self.points.manifolds), []
        self.stepping = True
        try:
            for group, bucket in plan.buckets:
                move = self._move(base, group, bucket)
                x, g = next(move)
                y = base.step([(group, bucket)], [(x, g.masked_fill_(bad, 0))])[0]
                bad = bad | ~torch.linalg.vector_norm(y).isfinite()
                moves.append((bucket, move, move.send(torch.where(bad, x, y))))
            for group, params in plan.euclidean:
                with unmoved_where(bad, params):
                    base.on_parameters(group, params, **getattr(self.base, "OFF_MANIFOLDS", {}))
            for bucket, move, y in moves:
                y.copy_(torch.where(bad, bucket.points(), y))
                next(move, None)
        finally:
            self.stepping = False
        if plan.skipped is not None:
            plan.skipped += bad
        self.steps += 1
        return True

    def _validate_on_device(self, groups: Sequence[Group], before: Sequence[Any]) -> None:
        """Refuse, before anything changes, what a CUDA graph cannot record or would record wrongly."""
        name = self.base.__name__
        if is_capturing() and before is not self.plan.buckets:
            raise RuntimeError("a step was captured before its memory was laid out: take a few ordinary steps first")
        if any(group["nonfinite"] == "refuse" for group in groups):
            raise ValueError("a captured step cannot refuse: pass nonfinite='skip'")
        if any(group["polish_every"] for group in groups):
            raise ValueError("polish_every counts steps on the host, which a captured step does not visit: leave it 0")
        if self.owners is not None or not self.elementwise or issubclass(self.base, OwnBase):
            raise ValueError(
                f"capturable=True takes an element-wise optimizer of torch without process_group, got {name}"
                + ("" if self.owners is None else " with process_group")
            )
        for _, bucket in self.plan.buckets:
            bucket.require_capturable()

    def _move(self, base: BaseStep, group: Group, bucket: Bucket) -> Generator[Any, Any, None]:
        """Move the points of one bucket: the lines of `RiemannianStep.step`.

        A generator with two pauses. The first yields points and gradients, and is sent the base optimizer's result:
        some base optimizers step once for all buckets. The second yields the new points, until all are computed.
        """
        options = dict(group)  # as they are before the base optimizer writes to its group
        x, g = bucket.points(), bucket.gradients()
        g = bucket.riemannian_(x, g, options["metric_pre"])
        y = yield x, g  # the base optimizer's own step
        d = y.sub_(x)
        d = bucket.scale_(d, options)
        d = bucket.canonical_(x, d) if options["tangent_post"] == "double" else d
        with base.moments(bucket.bank, bucket.parameters, carried=options["moments"] == "transport") as moments:
            y = bucket.retract_(x, d, moments, options)
        yield y
        bucket.write(y)

    def _move_all(self, optimizer: Any) -> None:
        """Move every bucket and step the Euclidean parameters; no point is written before all are finite."""
        for group in optimizer.param_groups:
            if group["polish_every"]:
                group["steps"] = group.get("steps", 0) + 1
        base = BaseStep(optimizer, self.base, self.points.manifolds)
        moves, lost = [], []
        for buckets in [[pair] for pair in self.plan.buckets] if self.elementwise else [self.plan.buckets]:
            together = [self._move(base, group, bucket) for group, bucket in buckets]
            results = base.step(buckets, [next(move) for move in together])
            for move, (_, bucket), y in zip(together, buckets, results, strict=True):
                lost += [bucket.parameters[i] for i in bucket.nonfinite(move.send(y))]
            moves += together
        if lost:
            raise NotFiniteError(lost)
        for group, params in self.plan.euclidean if self.elementwise else ():
            base.on_parameters(group, params, **getattr(self.base, "OFF_MANIFOLDS", {}))
        for move in moves:
            next(move, None)

    def follow(self, groups: Sequence[Group]) -> None:
        """Find new points, and manifolds that were replaced in their layers or in the points."""
        if self.points.follow(groups):
            self.plan.clear()  # its buckets stack the manifolds that were replaced

    def _skip(self, groups: Sequence[Group], points: Sequence[Tensor], problem: str, remedy: str) -> None:
        """Count a step that was skipped for these points, or raise where their group refuses it."""
        ids = {id(p) for p in points}
        if any(group["nonfinite"] == "refuse" and ids & {id(p) for p in group["params"]} for group in groups):
            shape = tuple(points[0].shape)
            raise ValueError(f"{problem}, the first of shape {shape}: {remedy}, or pass nonfinite='skip'") from None
        self.skipped += 1

    def __getstate__(self) -> Group:
        """Everything but buckets and scratch memory, which are made anew."""
        if self.owners is not None:
            raise TypeError("an optimizer with a process_group cannot be copied or pickled: save its state_dict()")
        return {**vars(self), "decay_given": False, "validated": [], "plan": Plan(self.base)}
