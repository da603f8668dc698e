"""Any torch optimizer, its step made Riemannian: the public classes, and the step in eight lines.

Projecting the displacement, rather than only the gradient, keeps the constraint: Adam's element-wise scaling turns a
tangent gradient into a step that is not tangent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from inspect import Signature
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.geometry.point_holders import enter_optimizer
from manifold_cl.geometry.points import ConstraintResiduals
from manifold_cl.layouts import is_dtensor
from manifold_cl.linalg import is_capturing
from manifold_cl.optim.base_step import plain_attributes, swapping_methods
from manifold_cl.optim.distributed import Owners
from manifold_cl.optim.groups import param_groups, take_points
from manifold_cl.optim.own_bases import MatrixAdam, MatrixMuon
from manifold_cl.optim.stepper import Stepper
from manifold_cl.optim.validation import (
    DEFAULTS,
    Group,
    listed_params,
    try_steps,
    validate_base,
    validate_direction,
    validate_group,
    validate_state,
    with_rate_of_groups,
    with_step_rule,
)

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object

CHECK_AT = (10, 100)
"""Early steps around which the constraint is measured: a leak that grows shows within tens of steps.

Before the step too: it brings back what another writer, such as a weight clip or an average, has moved since the last.
"""
CHECK_EVERY = 1000
"""Steps between later measurements of the constraint, which cost as much as a few steps each."""
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Element-wise state of AdamW and SGD."""
TOLERATED = 1e-5
"""Constraint error that is worth a warning: five times what float32 training stays below."""


class RiemannianStep(_Base):
    r"""The methods that `riemannian` adds to an optimizer class. Groups hold plain values only.

    Args:
        params: `param_groups`, ``geoopt.ManifoldParameter``\ s, or plain parameters and groups.
        *args: the base optimizer's.
        process_group: ranks that hold equal parameters (DDP). One of them then computes each point and all receive it,
            so that they stay equal bit for bit.
        **kwargs: the base optimizer's, and options of the step (docs/optimizers.md, "Options of the step"), which
            groups may override. ``lr`` is that of the groups where it is not given.

    Raises:
        ValueError: for an unknown option, a flag that cannot be honoured, a group without its manifolds, or a
            parameter that does not fit its manifold.
        TypeError: for half-precision or complex points, and for a base optimizer whose step cannot be taken as it is.
    """

    _riemannian: Stepper
    """Everything that is ours, in one attribute, so that no name hides one of the base class."""
    keeps_manifolds = True
    """Read by the guard that refuses ordinary optimizers on points."""
    own_defaults: ClassVar[Group] = {}
    """Options of the step whose default is another one in this class."""

    def __init__(self, params: Iterable[Any], *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        base = base_class(type(self))
        own = {name: kwargs.pop(name) for name in (*DEFAULTS, "step_rule") if name in kwargs}
        options = {**DEFAULTS, **self.own_defaults, **with_step_rule(own)}
        params = listed_params(type(self), params)
        groups = [p for p in params if isinstance(p, dict)]
        kwargs = with_rate_of_groups(base, params, args, kwargs)
        owners = None if process_group is None else Owners(process_group)
        self._riemannian = Stepper(base, options, owners, decay_given=bool(kwargs.get("weight_decay")))
        validate_group({**options, **kwargs}, base)
        super().__init__(params, *args, **kwargs)
        self.defaults.update(options)
        self._step_supports_amp_scaling = False  # with fused=True GradScaler would leave scaled and inf gradients to us
        if not base.__module__.startswith("torch.optim.") and not self._riemannian.elementwise:
            try_steps(base, self.param_groups, args, kwargs, flat=not groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; ``manifolds``, if given, runs parallel to ``params`` and is not stored in the group."""
        stepper = self._riemannian
        group = {**stepper.options, **with_step_rule(param_group)}  # the caller's own dict keeps its manifolds
        # A subclass may set a flag that its caller cannot see.
        validate_group(full := {**self.defaults, **group}, stepper.base)
        points, decayed = take_points(group), group.get("weight_decay", stepper.decay_given)
        validate_direction(full, points.values(), stepper.base)
        super().add_param_group(group)
        stepper.points.manifolds.update(points)
        stepper.follow(self.param_groups)
        enter_optimizer(self)
        if points and decayed:
            warnings.warn(
                "weight decay on a Stiefel point is radial, which is no direction on the manifold: points are stepped "
                "without it; set weight_decay=0 for that group",
                UserWarning,
                stacklevel=3,
            )

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step every parameter: points along their manifolds, others as the base optimizer does.

        For the points x of each bucket, in one tensor::

            x, g ← points, Euclidean gradients
            g ← grad f(x)                    the Riemannian gradient                metric_pre
            y ← base(x, g)                   the base optimizer's own step
            d ← y − x                        the displacement
            d ← s d                          s = 1, √(c/n) or √(c/p)                step_scale
            d ← P (d − x dᵀx)                where the canonical map is asked for   tangent_post
            y ← R_x(tangent part of d)       the retraction; moments are carried    moments
            write y                          when all points are computed and finite

        `Stepper._move` is the same in code. O(n p (k + p)) per point; P takes the part off the complement.

        Raises:
            ValueError: when a point's gradient, or its step, is not finite and ``nonfinite`` is "refuse".
            TypeError: for a sparse gradient.
        """
        if torch.compiler.is_compiling():  # the host decides what steps together: nothing here to trace
            return torch.compiler.disable(RiemannianStep.step)(self, closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = self._riemannian.steps + 1
        watched = (steps in CHECK_AT or steps % CHECK_EVERY == 0) and not is_capturing()
        if watched:
            self.constraint_error()
        with torch.no_grad():
            taken = self._riemannian.step(self)
        if watched and taken:
            self.constraint_error()
        return loss

    def constraint_error(self) -> ConstraintResiduals:
        """The largest errors of all points on restricted Stiefel manifolds, in float64; a warning, once, above 1e-5.

        NaN where a point holds one. For sharded points a collective that gathers one matrix at a time.
        """
        stepper = self._riemannian
        stepper.follow(self.param_groups)
        worst = stepper.points.constraint_error(self.param_groups)
        if all(error <= TOLERATED for error in worst):
            return worst
        stepper.plan.clear()  # its copies of the complements miss writes through .data
        if not stepper.warned:
            stepper.warned = True
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
        stepper = self._riemannian
        stepper.follow(self.param_groups)
        stepper.plan.update(self.param_groups, stepper.points.manifolds, self.state)
        return stepper.plan.grad_norm(stepper.points.manifolds)

    def manifold_of(self, parameter: Tensor) -> Any | None:
        """The manifold that ``parameter`` steps on, None where it is Euclidean."""
        return self._riemannian.points.manifolds.get(parameter)

    def held_parameters(self) -> list[Tensor]:
        """The points in the groups."""
        return self._riemannian.points.within(self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """The number of steps that ``nonfinite="skip"`` has left out. Waits for the device of a capturable step."""
        on_device = self._riemannian.plan.skipped
        return self._riemannian.skipped + (0 if on_device is None else int(on_device))

    def state_dict(self) -> Group:
        """The state as plain values. Numbers that a bank holds once for all its points are copied per parameter."""
        content = super().state_dict()
        for key, state in content["state"].items():
            if isinstance(state, dict):
                content["state"][key] = {
                    name: value.clone() if isinstance(value, Tensor) and not value.ndim else value
                    for name, value in state.items()
                }
        return content

    def load_state_dict(self, state_dict: Group) -> None:
        """Load a state, after validating that it belongs to these parameters.

        Raises:
            ValueError: naming what differs.
        """
        base = self._riemannian.base
        validate_state(self.param_groups, state_dict, base, shapes=self._riemannian.elementwise)
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if isinstance(p, Tensor) and p.shape == (1,):  # in states of earlier versions magnitudes are 0-d
                numbers = {k: v for k, v in state.items() if k in MOMENTS and isinstance(v, Tensor) and not v.ndim}
                state.update({key: value.reshape(1) for key, value in numbers.items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self).__dict__.get("_riemannian_made"):
            return _empty, (self._riemannian.base,), self.__getstate__()
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        """The base class's state, plain attributes that it does not mention, and the points with their manifolds."""
        return {**plain_attributes(self), **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        enter_optimizer(self)
        self._step_supports_amp_scaling = False
        for group in self.param_groups:  # a state saved before an option existed
            for option, default in DEFAULTS.items():
                group.setdefault(option, default)


@cache
def riemannian(optimizer: type[Optimizer]) -> type[Any]:
    """A subclass of ``optimizer`` whose step is Riemannian for every parameter on a manifold.

    Parameters come from `param_groups` (our adapters), as `geoopt.ManifoldParameter` (its manifold is used), or plain
    (they step as ever). Moments: docs/optimizers.md, "Kinds of Adam".

    Args:
        optimizer: any torch optimizer that evaluates its step once.

    Raises:
        TypeError: for a class that is no optimizer or does not fit, with the reason.

    >>> riemannian(torch.optim.NAdam).__name__
    'RiemannianNAdam'
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"riemannian() takes a torch.optim.Optimizer class, got {optimizer!r}")
    if issubclass(optimizer, RiemannianStep):
        raise TypeError(f"{optimizer.__name__} is Riemannian already")
    validate_base(optimizer)
    content = {
        "__doc__": f"`{optimizer.__module__}.{optimizer.__name__}` with a Riemannian step; see `riemannian`.",
        "__module__": __name__,
        "_riemannian_made": True,
        **swapping_methods(optimizer, RiemannianStep),
    }
    return type(f"Riemannian{optimizer.__name__}", (RiemannianStep, optimizer), content)


RiemannianAdamW: Any = riemannian(torch.optim.AdamW)
"""`torch.optim.AdamW` with a Riemannian step; weight decay acts on Euclidean parameters only."""

RiemannianSGD: Any = riemannian(torch.optim.SGD)
"""`torch.optim.SGD` (momentum, Nesterov) with a Riemannian step."""


class RiemannianAdam(RiemannianStep, MatrixAdam):
    """Adam with one second moment per matrix and transported averages: its steps commute with X → X O, O orthogonal.

    Takes the arguments of `MatrixAdam` and the options of the step. Euclidean parameters step as in Adam.
    """

    own_defaults: ClassVar[Group] = {"moments": "transport"}


class RiemannianMuon(RiemannianStep, MatrixMuon):
    """Steepest descent under the spectral norm: no step turns any direction by more than about ``lr`` radians.

    Takes the arguments of `MatrixMuon` and the options of the step. Euclidean parameters and magnitudes step as in
    AdamW. The directions: docs/optimizers.md, "Spectral steps".
    """

    own_defaults: ClassVar[Group] = {"moments": "transport"}


class TrainerOptimizer:
    """For ``Trainer(optimizer_cls_and_kwargs=...)``, as docs/optimizers.md shows; makes groups by `param_groups`."""

    __signature__ = Signature()
    """It is made without arguments; any that come are answered."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if args or options:
            raise TypeError(
                "TrainerOptimizer is called by Trainer: give optimizer_cls_and_kwargs=(TrainerOptimizer, {'lr': ...}), "
                "and in a loop of your own RiemannianAdamW(param_groups(model, lr=...))"
            )

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        scale_lr: float | None = None,
        weight_decay: float = 0.0,
        optimizer: type[Optimizer] | str = torch.optim.AdamW,
        **options: Any,
    ) -> Optimizer:
        """A Riemannian optimizer over the model's points, magnitudes and other trainable parameters.

        Args:
            model: with adapters in it.
            lr: of points and of other parameters; Trainer's scheduler starts from it.
            scale_lr: of magnitudes; ``lr`` if not given.
            weight_decay: of other matrices.
            optimizer: the class to make Riemannian, its name in torch.optim, or a Riemannian class.
            **options: of the base optimizer and of the step, such as ``step_rule``.

        Raises:
            ValueError: for an unknown name, or a model without trainable parameters.
        """
        groups = param_groups(model, lr=lr, scale_lr=scale_lr, weight_decay=weight_decay)
        if isinstance(optimizer, str):
            named = getattr(torch.optim, optimizer, None)
            if not isinstance(named, type):
                raise ValueError(f"torch.optim has no {optimizer!r}: pass an optimizer class or its name")
            optimizer = named
        own = isinstance(optimizer, type) and issubclass(optimizer, RiemannianStep)
        make = optimizer if own else riemannian(cast(Any, optimizer))
        made: Optimizer = make(groups, **options)
        return made


@torch.no_grad()
def clip_riemannian_grad_norm_(
    optimizer: RiemannianStep, max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """The norm of all gradients before clipping, Riemannian on manifolds; scales every ``p.grad`` down to ``max_norm``.

    `torch.nn.utils.clip_grad_norm_` measures Euclidean gradients. Their normal part can be most of them, and no step
    follows it: short steps are then shortened further. Costs one more projection of the gradients.

    Args:
        optimizer: whose parameters' gradients are measured, each in the metric of its manifold.
        max_norm: the largest norm that is left alone.
        error_if_nonfinite: raise instead of scaling by NaN.

    Raises:
        TypeError: for an optimizer that is not Riemannian.
        ValueError: for a bound that is not positive.
        RuntimeError: with ``error_if_nonfinite``, for a norm that is not finite; nothing is scaled then.
    """
    if not isinstance(optimizer, RiemannianStep):
        kind = type(optimizer).__name__
        raise TypeError(f"clip_riemannian_grad_norm_ takes a Riemannian optimizer, which has the manifolds, got {kind}")
    if not max_norm > 0:
        raise ValueError(f"max_norm is positive, got {max_norm}")
    total = optimizer.riemannian_grad_norm()
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the Riemannian gradient norm is {float(total)}: nothing was scaled")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch: no division by zero
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                grad = p.grad.to_local() if is_dtensor(p.grad) else p.grad
                grad.mul_(factor.to(grad.device))
    return total


def base_class(kind: type[Any]) -> type[Optimizer]:
    """The optimizer class that was made Riemannian: the first after the step in the order of resolution."""
    return kind.__mro__[kind.__mro__.index(RiemannianStep) + 1]


def _empty(base: type[Optimizer]) -> Any:
    """An instance of ``riemannian(base)`` without content, for pickle and copy."""
    kind: Any = riemannian(base)  # type: ignore[arg-type]  # a class is hashable
    return kind.__new__(kind)


def __getattr__(name: str) -> type[Any]:
    """The Riemannian form of any optimizer of torch.optim by name, which is how pickle finds it again."""
    base = getattr(torch.optim, name.removeprefix("Riemannian"), None)
    if not name.startswith("Riemannian") or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return riemannian(base)
