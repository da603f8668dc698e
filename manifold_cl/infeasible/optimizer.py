"""Any torch optimizer whose points step without a retraction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.point_holders import enter_optimizer
from manifold_cl.geometry.points import ConstraintResiduals
from manifold_cl.infeasible.choice import as_infeasible_step
from manifold_cl.infeasible.protocol import InfeasibleStep
from manifold_cl.layouts import is_dtensor
from manifold_cl.linalg import full_precision, gram, project_out, sym
from manifold_cl.optim.base_step import BaseStep, plain_attributes, undone_on_failure
from manifold_cl.optim.groups import Points, take_points
from manifold_cl.optim.validation import Group, listed_params, validate_base, with_rate_of_groups

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object


class InfeasibleOptimizer(_Base):
    r"""The methods that `infeasible` adds to an optimizer class.

    Args:
        params: `param_groups`, ``geoopt.ManifoldParameter``\ s on `RestrictedStiefel`, or plain parameters and groups.
        *args: the base optimizer's.
        **kwargs: the base optimizer's.

    Raises:
        ValueError: for a group without its manifolds, and a parameter that does not fit its manifold.
        TypeError: for half-precision or complex points, sharded ones, and those of another manifold.
    """

    base: ClassVar[type[Optimizer]]
    """The optimizer class that makes the displacements."""
    infeasible_step: ClassVar[InfeasibleStep]
    """The step that points take."""
    keeps_manifolds = True
    """Read by the guard that refuses ordinary optimizers on points."""

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        self._points = Points()
        params = listed_params(type(self), params)
        super().__init__(params, *args, **with_rate_of_groups(self.base, params, args, kwargs))
        self._step_supports_amp_scaling = False  # with fused=True GradScaler would leave scaled and inf gradients to us

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; ``manifolds``, if given, runs parallel to ``params`` and is not stored in the group."""
        group = dict(param_group)
        points = take_points(group)
        for p, manifold in points.items():
            if not isinstance(manifold, RestrictedStiefel):
                raise TypeError(f"steps without a retraction are for RestrictedStiefel, got {type(manifold).__name__}")
            if is_dtensor(p):
                raise TypeError(f"a point of shape {tuple(p.shape)} is sharded: steps need complete matrices")
        super().add_param_group(group)
        self._points.manifolds.update(points)
        self._points.follow(self.param_groups)
        enter_optimizer(self)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step every parameter: points without a retraction, others as the base optimizer does.

        For the points x of equal shape, rate and number of protected directions, in one tensor::

            g ← P (g − x sym(xᵀg))       Euclidean gradients, without normal parts
            d ← P (base(x, g) − x)       the displacement of the base optimizer's own step
            y ← P step(x, d, lr)         the step; P acts on the sum of x and the change

        Raises:
            ValueError: when a gradient is not finite (nothing has changed), or a step is not (no parameter has moved).
            TypeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def constraint_error(self) -> ConstraintResiduals:
        """The largest errors of all points, in float64: the distance that these steps control. NaN for a NaN."""
        self._points.follow(self.param_groups)
        return self._points.constraint_error(self.param_groups)

    @torch.no_grad()
    def return_to_manifold(self) -> ConstraintResiduals:
        """Replace every point by the nearest one, computed in float64. Returns the errors before.

        Raises:
            ValueError: for a point that is not finite, or whose rank is too low.
        """
        before = self.constraint_error()
        for p in self.held_parameters():
            p.copy_(self._points.manifolds[p].projx(p.double()))
        return before

    def manifold_of(self, parameter: Tensor) -> Any | None:
        """The manifold that ``parameter`` stays near, None where it is Euclidean."""
        return self._points.manifolds.get(parameter)

    def held_parameters(self) -> list[Tensor]:
        """The points in the groups."""
        return self._points.within(self.param_groups)

    def _step(self) -> None:
        groups, manifolds = self.param_groups, self._points.manifolds
        self._points.follow(groups)
        bad, large = self._points.measure_gradients(groups, None)
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(self.held_parameters())} points have NaN or infinite entries in their gradient, "
                f"the first of shape {tuple(bad[0].shape)}: nothing was changed; look at the loss, use a GradScaler"
            )
        copies = {p: p.detach().clone() for group in groups for p in group["params"] if p.grad is not None}
        batches = [
            Batch(points, torch.stack([copies[p] for p in points]), _bases(points, manifolds), group.get("lr", 1.0))
            for group in groups
            for points in _alike([p for p in group["params"] if p in copies and p in manifolds], manifolds)
        ]
        with undone_on_failure(self, copies, completely=large):
            BaseStep(self, self.base, manifolds).at_once({p: g for batch in batches for p, g in batch.gradients()})
            for batch in batches:
                batch.move(self.infeasible_step)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.base, self.infeasible_step), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """The base class's state, plain attributes that it does not mention, and the points with their manifolds."""
        return {**plain_attributes(self), **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        enter_optimizer(self)


class Batch(NamedTuple):
    """Points of one group that step together, as tensors x (B, …, n, p) and protected directions (B, …, n, k)."""

    points: Sequence[Tensor]
    x: Tensor
    basis: Tensor | None
    lr: float | Tensor

    def gradients(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The gradient of each point without its normal part, which an element-wise optimizer would make tangent."""
        g = torch.stack([p.grad for p in self.points if p.grad is not None])
        with full_precision(g.device):
            return zip(self.points, self._off(g - self.x @ sym(gram(self.x, g))).unbind(0), strict=True)

    def move(self, step: InfeasibleStep) -> None:
        """Replace the base optimizer's results by those of ``step``. ValueError if they are not finite."""
        with full_precision(self.x.device):
            d = self._off(torch.stack([p.detach() for p in self.points]) - self.x)
            y = self._off(step(self.x, d, lr=self.lr))
        if not bool(y.isfinite().all()):
            raise ValueError(
                f"a step {step.name!r} of points of shape {tuple(self.points[0].shape)} is not finite: no parameter "
                "has moved, only averages of gradients; lower lr, or call return_to_manifold()"
            )
        for p, new in zip(self.points, y.unbind(0), strict=True):
            p.copy_(new)

    def _off(self, a: Tensor) -> Tensor:
        return a if self.basis is None else project_out(a, self.basis)


def infeasible(optimizer: type[Optimizer], *, step: InfeasibleStep | str | Callable[..., Tensor] = "pogo") -> type[Any]:
    """A subclass of ``optimizer`` that moves points by a step without a retraction.

    The base optimizer makes the displacement. Parameters are those of `riemannian`, on `RestrictedStiefel` only. End
    with ``optimizer.return_to_manifold()``.

    Args:
        optimizer: any torch optimizer that evaluates its step once.
        step: a name in `INFEASIBLE_STEPS`, an object, or a function ``f(x, d, lr=...)``. Tried on a small problem.

    Raises:
        TypeError: for a class that is no optimizer or does not fit, with the reason.
        ValueError: for an unknown name, or a step that fails its trial.

    >>> infeasible(torch.optim.SGD, step="landing").__name__
    'InfeasibleSGD'
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"infeasible() takes a torch.optim.Optimizer class, got {optimizer!r}")
    if getattr(optimizer, "keeps_manifolds", False):
        raise TypeError(f"{optimizer.__name__} keeps points on manifolds already: pass its base class")
    validate_base(optimizer)
    kind: type[Any] = _class(optimizer, as_infeasible_step(step))  # type: ignore[arg-type]  # both are hashable
    return kind


@cache
def _class(base: type[Optimizer], step: InfeasibleStep) -> type[Any]:
    content = {
        "__doc__": f"`{base.__module__}.{base.__name__}` with the step {step.name!r}; see `infeasible`.",
        "__module__": __name__,
        "base": base,
        "infeasible_step": step,
    }
    return type(f"Infeasible{base.__name__}", (InfeasibleOptimizer, base), content)


def _empty(base: type[Optimizer], step: InfeasibleStep) -> Any:
    """An instance without content, for pickle and copy."""
    kind: Any = _class(base, step)  # type: ignore[arg-type]  # both are hashable
    return kind.__new__(kind)


def _alike(points: Iterable[Tensor], manifolds: Mapping[Tensor, Any]) -> Iterable[list[Tensor]]:
    """The points, grouped by shape, dtype, device and width of the complement; batches of points are alone."""
    groups: dict[Any, list[Tensor]] = {}
    for p in points:
        alone = id(p) if p.ndim > 2 else None
        groups.setdefault((p.shape, p.dtype, p.device, manifolds[p].width, alone), []).append(p)
    return groups.values()


def _bases(points: Sequence[Tensor], manifolds: Mapping[Tensor, Any]) -> Tensor | None:
    """The protected directions (B, …, n, k) of points that are `_alike`."""
    if not manifolds[points[0]].width:
        return None
    return torch.stack([manifolds[p].complement.to(p.dtype) for p in points])
