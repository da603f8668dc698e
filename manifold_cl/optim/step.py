"""The Riemannian step around a torch optimizer's own: what `riemannian` adds to a class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry.points import ConstraintError
from manifold_cl.geometry.restricted_stiefel import kind_of
from manifold_cl.optim.banks import SCALED
from manifold_cl.optim.base import BaseStep
from manifold_cl.optim.buckets import Bucket, Workspace
from manifold_cl.optim.gradients import refusal, unfit
from manifold_cl.optim.inputs import check_before_step, check_point, check_state, refuse_duplicates
from manifold_cl.optim.layout import is_dtensor
from manifold_cl.optim.options import DEFAULTS, Group, check_options, scale_of
from manifold_cl.optim.planning import Plan
from manifold_cl.optim.sharing import Owners, groups_of

WITHOUT_VECTORS = ("Adadelta", "Adafactor", "Adagrad", "Rprop")
"""Optimizers that keep no average of gradients, so that there is nothing to transport."""
FLAGS = {
    "differentiable": "the step reads parameters outside autograd",
    "capturable": "the step asks the host whether a gradient is finite, which a CUDA graph cannot replay",
}
CHECK_EVERY = 1000
"""Steps between measurements of the constraint, which cost as much as a few steps each."""
TOLERATED = 1e-5
"""Constraint error that is worth a warning: five times what float32 training stays below (promise 1)."""


class RiemannianStep(BaseStep):
    r"""What `riemannian` adds to an optimizer class. The work happens in `step`; groups hold plain values only.

    Args:
        params: `param_groups`, ``geoopt.ManifoldParameter``\ s, or plain parameters and groups.
        *args: the base optimizer's.
        process_group: ranks that hold equal parameters (DDP): every point is then worked out by one of them and
            received by all, so that they stay equal bit for bit.
        **kwargs: the base optimizer's, and options of the step (`DEFAULTS`), which groups may override.

    Raises:
        ValueError: for an unknown option, a flag that cannot be honoured, a group without its manifolds, or a
            parameter that does not fit its manifold.
        TypeError: for half-precision or complex points.
    """

    _euclidean_options: Mapping[str, Any] = {}
    """Options of the base optimizer that differ for Euclidean parameters."""

    def __init__(self, params: Iterable[Any], *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        for flag, reason in FLAGS.items():
            if kwargs.get(flag):
                raise ValueError(f"{flag}=True is not supported: {reason}")
        self._options = {name: kwargs.pop(name, default) for name, default in DEFAULTS.items()}
        self._manifolds: dict[Tensor, Any] = {}
        self._owners = None if process_group is None else Owners(process_group)
        self._plan, self._workspace, self._written = Plan(), Workspace(), {}
        self._decay_asked = bool(kwargs.get("weight_decay"))
        self._warned = False
        self._steps = 0
        self.skipped_steps = 0
        super().__init__(params, *args, **kwargs)
        self.defaults.update(self._options)
        self._step_supports_amp_scaling = False  # with fused=True GradScaler would leave scaled and inf gradients to us

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; ``manifolds``, if given, runs parallel to ``params`` and is not stored in the group."""
        group = dict(param_group)  # the caller's own dict keeps its manifolds
        manifolds = group.pop("manifolds", None)
        asked = self._decay_asked if "weight_decay" not in group else bool(group["weight_decay"])
        group = {**self._options, **group}
        check_options(group)
        base = self._base_class().__name__
        if group["moments"] == "transport" and base in WITHOUT_VECTORS:
            raise ValueError(f"moments='transport' has nothing to carry in {base}, which averages no gradients")
        if isinstance(group["params"], set):
            raise TypeError("parameters need an order that every run repeats, which a set does not have: pass a list")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        refuse_duplicates(params)
        points = self._points(params, manifolds, marked=group.get("manifold", "euclidean"))
        super().add_param_group(group)
        self._manifolds.update(points)
        if points and asked:
            warnings.warn(
                "weight decay on a Stiefel point is radial, which is no direction on the manifold: points are stepped "
                "without it; set weight_decay=0 for that group",
                UserWarning,
                stacklevel=3,
            )

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step: the base optimizer's displacement, made tangent and retracted on every manifold.

        Source: method.md 1.3 and 1.5. One projection on the complement for the displacement, one more where
        ``metric_pre`` asks for it; O(n p (k + p)) a point.

        Raises:
            ValueError: when a point's gradient is not finite and ``nonfinite`` is "refuse"; nothing has changed then.
            TypeError: for a sparse gradient.
        """
        if torch.compiler.is_compiling():  # the host decides what steps together: nothing here to trace
            return torch.compiler.disable(self._step)(closure)  # type: ignore[no-untyped-call]
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if not self._admit():
                self.skipped_steps += 1
                return loss
            for group in self.param_groups:
                if group["polish_every"]:
                    group["steps"] = group.get("steps", 0) + 1
            plan = self._updated_plan()
            self._written.clear()
            for group, bucket in plan.points:
                self._move(group, bucket)
            for group, params in plan.rest:
                with self._only(group, params, **self._euclidean_options):
                    self._base_step()
            self._keep_written()
        self._steps += 1
        if self._steps % CHECK_EVERY == 0:
            self.constraint_error()
        return loss

    def constraint_error(self) -> ConstraintError:
        """The largest errors of all points on restricted Stiefel manifolds, in float64; a warning, once, above 1e-5.

        For sharded points a collective that gathers one matrix at a time.
        """
        worst = ConstraintError(0.0, 0.0)
        for p, manifold in self._manifolds.items():
            if hasattr(manifold, "constraint_error"):
                whole = p.full_tensor() if is_dtensor(p) else p  # type: ignore[attr-defined]
                error = manifold.constraint_error(whole)
                worst = ConstraintError(*(max(a, b) if a == a else a for a, b in zip(error, worst, strict=True)))
        if not max(worst) <= TOLERATED and not self._warned:
            self._warned = True
            warnings.warn(
                f"points have left their manifold ({worst}): bring them back with p.copy_(manifold.projx(p)), then "
                "keep them in float32, let nothing else write to them, or pass polish_every=100",
                UserWarning,
                stacklevel=2,
            )
        return worst

    @torch.no_grad()
    def riemannian_grad_norm(self) -> Tensor:
        """The norm of all gradients together, 0-d: Riemannian where a parameter is on a manifold."""
        plan = self._updated_plan()
        total = torch.zeros((), dtype=torch.float64)
        for _, bucket in plan.points:
            x, g = (self._workspace.take(slot, bucket.own_shape, bucket.locals[0]) for slot in "xg")
            if len(x):
                bucket.gather_own(x)
                bucket.gather_grads(g, bucket.part)
                bucket.gradient_(x, g, self._workspace, metric="own")
                total += bucket.norm_squared(x, g).cpu()
        if self._owners is not None and self._manifolds:
            self._owners.add_(total, next(iter(self._manifolds)).device)
        for _, params in plan.rest:
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            total += (norm.full_tensor() if is_dtensor(norm) else norm).double().cpu() ** 2  # type: ignore[attr-defined]
        return total.sqrt()

    def manifold_of(self, parameter: Tensor) -> Any | None:
        """The manifold that ``parameter`` steps on, None where it is Euclidean."""
        return self._manifolds.get(parameter)

    def state_dict(self) -> Group:
        """As of every torch optimizer. Numbers that a bank holds once for all its points are copied for each."""
        content = super().state_dict()
        for key, state in content["state"].items():
            content["state"][key] = {
                name: value.clone() if isinstance(value, Tensor) and not value.ndim else value
                for name, value in state.items()
            }
        return content

    def load_state_dict(self, state_dict: Group) -> None:
        """Load, as every torch optimizer does, after a look at whether the state belongs to these parameters.

        Raises:
            ValueError: naming what differs.
        """
        check_state(self.param_groups, state_dict)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """The base class's plain state plus the manifolds, so that copies step on them too."""
        if self._owners is not None:
            raise TypeError("an optimizer with a process_group cannot be copied or pickled: save its state_dict()")
        own = {name: getattr(self, name) for name in ("_manifolds", "_options", "_steps", "_warned", "skipped_steps")}
        return {**super().__getstate__(), **own, "_decay_asked": False, "_owners": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; what steps together is worked out anew at the next step."""
        self._plan, self._workspace, self._written = Plan(), Workspace(), {}
        super().__setstate__(state)
        self._step_supports_amp_scaling = False
        for group in self.param_groups:  # a state saved before an option existed
            for option, default in DEFAULTS.items():
                group.setdefault(option, default)

    # -- inside ---------------------------------------------------------------------------------

    def _updated_plan(self) -> Plan:
        return self._plan.updated(self.param_groups, self._manifolds, self.state, self._base_class(), self._owners)

    def _move(self, group: Group, bucket: Bucket) -> None:
        """The step of one bucket, on scratch memory: x the points, g their gradients, y what the base makes of x."""
        part, like = bucket.part, bucket.locals[0]
        y, g = (self._workspace.take(slot, bucket.shape, like) for slot in "yg")
        bucket.gather(y)
        x = self._workspace.take("x", y[part].shape, like).copy_(y[part])
        metric = group["metric_pre"]
        if metric == "none":
            bucket.gather_grads(g, slice(None))
        else:
            bucket.gather_grads(g[part], part)
            if len(x):
                bucket.gradient_(x, g[part], self._workspace, metric=metric)
            self._share(g, bucket)
        vectors = self._base_on(group, bucket, y, g)
        d, moved = y[part], [v[part] for v in vectors]
        if _rate_is_zero(group) and bucket.bank is not None:
            return  # nothing moved, to the bit; a retraction would round
        if len(x):
            d.sub_(x)
            if group["step_scale"] != "none":
                d.mul_(scale_of(group, *_sides(bucket.locals[0])))
            if group["tangent_post"] == "double":
                bucket.double_(x, d, self._workspace)
            known = bucket.bank is not None and self._base_class().__name__ not in SCALED
            bucket.move_(x, d, moved, self._workspace, tangent=known and metric != "none")
            if group["polish_every"] and group["steps"] % group["polish_every"] == 0:
                bucket.polish_(d)
        for slab in (y, *vectors):
            self._share(slab, bucket)
        bucket.scatter(y)
        if bucket.bank is None:
            self._put_back(bucket, vectors)

    def _share(self, slab: Tensor, bucket: Bucket) -> None:
        if self._owners is not None and bucket.parts is not None:
            self._owners.share_(slab, bucket.parts)

    def _admit(self) -> bool:
        """Whether the gradients of the points are fit to step on, on all ranks."""
        points = [p for group in self.param_groups for p in group["params"] if p in self._manifolds]
        for p in points:
            check_before_step(p, self._manifolds[p])
        groups = groups_of(points) + ([] if self._owners is None else [self._owners.group])
        bad = unfit(points, groups)
        if not bad:
            return True
        ids = {id(p) for p in bad}
        if any(g["nonfinite"] == "refuse" and ids & {id(p) for p in g["params"]} for g in self.param_groups):
            raise ValueError(refusal(bad, len(points)))
        return False

    @staticmethod
    def _points(params: Sequence[Tensor], manifolds: Sequence[Any] | None, *, marked: str) -> dict[Tensor, Any]:
        """Those of the parameters that are points, with their manifolds."""
        if manifolds is not None and len(manifolds) != len(params):
            raise ValueError(f"a group has {len(params)} parameters and {len(manifolds)} manifolds: they run parallel")
        points: dict[Tensor, Any] = {}
        own = [getattr(p, "manifold", None) for p in params]
        for p, manifold in zip(params, own if manifolds is None else manifolds, strict=True):
            if manifold is None or kind_of(manifold) == "Euclidean":
                if marked not in ("euclidean", ""):
                    raise ValueError(
                        f"the group is marked manifold={marked!r} but the manifold of a parameter of shape "
                        f"{tuple(p.shape)} is missing: build the groups with param_groups(model)"
                    )
                continue
            check_point(p, manifold)
            points[p] = manifold
        return points


def _sides(point: Tensor) -> tuple[int, int]:
    """(n, p); a vector is one column."""
    n, p = (point.shape[0], 1) if point.ndim == 1 else point.shape[-2:]
    return n, p


def _rate_is_zero(group: Group) -> bool:
    lr = group.get("lr", 1.0)
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False  # not worth waiting for a device
    return float(lr) == 0
