"""The Riemannian step around a torch optimizer's own: what `riemannian` adds to a class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.geometry.point_holders import Slot, enter_optimizer, held_slots
from manifold_cl.geometry.points import ConstraintResiduals
from manifold_cl.geometry.restricted_stiefel import kind_of
from manifold_cl.optim.inputs import check_point, check_state, refuse_duplicates, refuse_flags
from manifold_cl.optim.options import DEFAULTS, Group, check_options
from manifold_cl.optim.planning import Plan
from manifold_cl.optim.refusals import try_steps
from manifold_cl.optim.sharing import Owners
from manifold_cl.optim.stepper import Stepper

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object

WITHOUT_VECTORS = ("Adadelta", "Adafactor", "Adagrad", "Rprop")
"""Optimizers that keep no average of gradients, so that there is nothing to transport."""
CHECK_AT = (10, 100)
"""Early steps after which the constraint is measured: a leak that grows shows within tens of steps."""
CHECK_EVERY = 1000
"""Steps between later measurements of the constraint, which cost as much as a few steps each."""
TOLERATED = 1e-5
"""Constraint error that is worth a warning: five times what float32 training stays below (promise 1)."""


class RiemannianStep(_Base):
    r"""What `riemannian` adds to an optimizer class. Groups hold plain values only.

    The points and how they step lie in one attribute, `Stepper`, so that no name hides one of the base class.

    Args:
        params: `param_groups`, ``geoopt.ManifoldParameter``\ s, or plain parameters and groups.
        *args: the base optimizer's.
        process_group: ranks that hold equal parameters (DDP): every point is then worked out by one of them and
            received by all, so that they stay equal bit for bit.
        **kwargs: the base optimizer's, and options of the step (`DEFAULTS`), which groups may override.

    Raises:
        ValueError: for an unknown option, a flag that cannot be honoured, a group without its manifolds, or a
            parameter that does not fit its manifold.
        TypeError: for half-precision or complex points, and for a base optimizer whose step cannot be taken as it is.
    """

    _riemannian: Stepper
    keeps_manifolds = True
    """Read by the guard that refuses ordinary optimizers on points."""

    def __init__(self, params: Iterable[Any], *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        refuse_flags(kwargs)
        options = {name: kwargs.pop(name, default) for name, default in DEFAULTS.items()}
        owners = None if process_group is None else Owners(process_group)
        base = base_class(type(self))
        self._riemannian = Stepper(base, options, owners, decay_asked=bool(kwargs.get("weight_decay")))
        params = params if isinstance(params, Tensor) else list(params)
        super().__init__(params, *args, **kwargs)
        self.defaults.update(options)
        self._step_supports_amp_scaling = False  # with fused=True GradScaler would leave scaled and inf gradients to us
        if not base.__module__.startswith("torch.optim.") and not self._riemannian.elementwise:
            try_steps(base, self.param_groups, args, kwargs, flat=not any(isinstance(p, dict) for p in params))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; ``manifolds``, if given, runs parallel to ``params`` and is not stored in the group."""
        stepper = self._riemannian
        group = dict(param_group)  # the caller's own dict keeps its manifolds
        manifolds = group.pop("manifolds", None)
        asked = stepper.decay_asked if "weight_decay" not in group else bool(group["weight_decay"])
        group = {**stepper.options, **group}
        check_options(group)
        refuse_flags({**self.defaults, **group})  # a subclass may set a flag that its caller cannot see
        base = stepper.base.__name__
        if group["moments"] == "transport" and base in WITHOUT_VECTORS:
            raise ValueError(f"moments='transport' has nothing to carry in {base}, which averages no gradients")
        if isinstance(group["params"], set):
            raise TypeError("parameters need an order that every run repeats, which a set does not have: pass a list")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        refuse_duplicates(params)
        marked = group.get("manifold", "euclidean")
        live = held_slots() if manifolds is None and marked in ("euclidean", "") else {}
        points = _points(params, manifolds, live, marked=marked)
        super().add_param_group(group)
        stepper.manifolds.update(points)
        stepper.follow(self.param_groups)
        enter_optimizer(self)
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
            ValueError: when a point's gradient, or its step, is not finite and ``nonfinite`` is "refuse".
            TypeError: for a sparse gradient.
        """
        if torch.compiler.is_compiling():  # the host decides what steps together: nothing here to trace
            return torch.compiler.disable(RiemannianStep.step)(self, closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            taken = self._riemannian.step(self)
        steps = self._riemannian.steps
        if taken and (steps in CHECK_AT or steps % CHECK_EVERY == 0):
            self.constraint_error()
        return loss

    def constraint_error(self) -> ConstraintResiduals:
        """The largest errors of all points on restricted Stiefel manifolds, in float64; a warning, once, above 1e-5.

        NaN where a point holds one. For sharded points a collective that gathers one matrix at a time.
        """
        worst = self._riemannian.constraint_error(self.param_groups)
        kept = all(error <= TOLERATED for error in worst)
        if not kept:
            self._riemannian.plan = Plan()  # its copies of the complements miss what was written through .data
        if not kept and not self._riemannian.warned:
            self._riemannian.warned = True
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
        return self._riemannian.grad_norm(self)

    def manifold_of(self, parameter: Tensor) -> Any | None:
        """The manifold that ``parameter`` steps on, None where it is Euclidean."""
        return self._riemannian.manifolds.get(parameter)

    def held_parameters(self) -> list[Tensor]:
        """The points in the groups."""
        return self._riemannian.points(self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """The number of steps that ``nonfinite="skip"`` has left out."""
        return self._riemannian.skipped

    def state_dict(self) -> Group:
        """As of every torch optimizer. Numbers that a bank holds once for all its points are copied for each."""
        content = super().state_dict()
        for key, state in content["state"].items():
            if isinstance(state, dict):
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
        check_state(self.param_groups, state_dict, shapes=self._riemannian.elementwise)
        super().load_state_dict(state_dict)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The base class and the state: classes made by `riemannian` are found again through their base."""
        kind = type(self)
        if kind.__dict__.get("_riemannian_made"):
            return _empty, (self._riemannian.base,), self.__getstate__()
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        """The base class's state, plain attributes that it does not mention, and the points with their manifolds."""
        attributes = {name: value for name, value in vars(self).items() if not _is_torchs(name)}
        return {**attributes, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; what steps together is worked out anew at the next step."""
        super().__setstate__(state)
        enter_optimizer(self)
        self._step_supports_amp_scaling = False
        for group in self.param_groups:  # a state saved before an option existed
            for option, default in DEFAULTS.items():
                group.setdefault(option, default)


def base_class(kind: type[Any]) -> type[Optimizer]:
    """The optimizer class that was made Riemannian: the first after the step in the order of resolution."""
    order = kind.__mro__
    base: type[Optimizer] = order[order.index(RiemannianStep) + 1]
    return base


def _empty(base: type[Optimizer]) -> Any:
    """An instance of ``riemannian(base)`` without content, for pickle and copy."""
    from manifold_cl.optim.riemannian import riemannian

    kind: Any = riemannian(base)  # type: ignore[arg-type]  # a class is hashable
    return kind.__new__(kind)


def _is_torchs(name: str) -> bool:
    """Whether torch makes this attribute anew: hooks, and ``step`` where a scheduler counts calls of it."""
    return name.startswith("_optimizer_") or name in ("step", "_opt_called", "_zero_grad_profile_name")


def _points(
    params: Sequence[Tensor], manifolds: Sequence[Any] | None, live: Mapping[Tensor, Slot], *, marked: str
) -> dict[Tensor, Any]:
    """Those of the parameters that are points, with their manifolds."""
    if manifolds is not None and len(manifolds) != len(params):
        raise ValueError(f"a group has {len(params)} parameters and {len(manifolds)} manifolds: they run parallel")
    points: dict[Tensor, Any] = {}
    own = [live[p].manifold if p in live else getattr(p, "manifold", None) for p in params]
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
