"""Any torch optimizer, its step made Riemannian.

The base optimizer computes its ordinary step, element-wise moments and all. What it did to a parameter on a
manifold is then read off as a displacement, made tangent, and retracted. Projecting the displacement, rather
than only the gradient, is what keeps the constraint: Adam's element-wise scaling turns a tangent gradient into
a step that is not tangent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.geometry.restricted_stiefel import kind_of
from manifold_cl.linalg import full_precision, project_out
from manifold_cl.optim.buckets import Bucket, Member, bucketed

Group = dict[str, Any]

CHOICES = {
    "metric_pre": ("none", "euclidean", "canonical"),
    "tangent_post": ("orthogonal", "double"),
    "step_scale": ("none", "width", "official"),
}
REFUSED = {
    "LBFGS": "it evaluates the loss several times inside one step, each time at a point off the manifold",
    "SparseAdam": "a point of a manifold has no sparse gradient",
    "Muon": "it orthogonalises the step itself, which makes its length meaningless on a Stiefel manifold",
}


def corrected() -> dict[str, Any]:
    """The default step: Riemannian gradient into the moments, displacement projected orthogonally, no rescaling.

    Source: method.md 1.5.
    """
    return {"metric_pre": "euclidean", "tangent_post": "orthogonal", "step_scale": "none", "reference_width": 4096}


def official() -> dict[str, Any]:
    """The step of EBLoRA's released code, to the letter: for reproduction, not for use.

    The canonical-gradient map before *and after* the base step, where it doubles the rotation, and steps
    enlarged by sqrt(4096 / r). Source: gu2026eblora, released code, as analysed in method.md 1.3 and 6.1-6.2.
    """
    return {"metric_pre": "canonical", "tangent_post": "double", "step_scale": "official", "reference_width": 4096}


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
        model: modules that follow `OnManifolds` (our adapters do) are asked for their points and scales.
        lr: for points and for other parameters.
        scale_lr: for magnitudes; ``lr`` if not given.
        weight_decay: for other trainable matrices; points and scales have none (on a point it would do nothing).
    """
    points: list[tuple[nn.Parameter, Any]] = []
    scales: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, OnManifolds):
            points += [(p, manifold) for _, p, manifold in module.manifold_parameters() if p.requires_grad]
            scales += [p for _, p in module.scale_parameters() if p.requires_grad]
    taken = {id(p) for p, _ in points} | {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[Group] = [
        {
            "params": [p for p, _ in points],
            "manifolds": [manifold for _, manifold in points],
            "manifold": RestrictedStiefel.name,
            "role": "points",
            "lr": lr,
            "weight_decay": 0.0,
        },
        {"params": scales, "role": "scales", "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "role": "decay", "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "role": "no_decay", "lr": lr, "weight_decay": 0.0},
    ]
    groups = [{"manifold": "euclidean", **group} for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameters: inject adapters first, or unfreeze something")
    return groups


if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object


class RiemannianStep(_Base):
    """What `riemannian` adds to an optimizer class. The work happens in `step`; groups hold plain values only."""

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        metric_pre: Literal["none", "euclidean", "canonical"] = "euclidean",
        tangent_post: Literal["orthogonal", "double"] = "orthogonal",
        step_scale: Literal["none", "width", "official"] = "none",
        reference_width: int = 4096,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("differentiable"):
            raise ValueError("differentiable=True is not supported: the step reads parameters outside autograd")
        self._options = {
            "metric_pre": metric_pre,
            "tangent_post": tangent_post,
            "step_scale": step_scale,
            "reference_width": reference_width,
        }
        self._manifolds: dict[Tensor, Any] = {}
        self._buckets: dict[tuple[int, ...], Bucket] = {}
        self._decay_asked = bool(kwargs.get("weight_decay"))
        super().__init__(params, *args, **kwargs)
        self.defaults.update(self._options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; ``manifolds``, if given, runs parallel to ``params`` and is not stored in the group."""
        group = dict(param_group)  # the caller's own dict keeps its manifolds
        manifolds = group.pop("manifolds", None)
        asked = self._decay_asked if "weight_decay" not in group else bool(group["weight_decay"])
        group = {**self._options, **group}
        for option, choices in CHOICES.items():
            if group[option] not in choices:
                raise ValueError(f"{option} is one of {', '.join(choices)}, got {group[option]!r}")
        super().add_param_group(group)
        stored = self.param_groups[-1]
        self._adopt(stored["params"], manifolds, marked=stored.get("manifold", "euclidean"))
        points = [p for p in stored["params"] if p in self._manifolds]
        if points and asked:
            warnings.warn(
                "weight decay on a Stiefel point is radial and vanishes with the tangent projection: "
                "it does nothing there; set weight_decay=0 for that group",
                UserWarning,
                stacklevel=3,
            )

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step: the base optimizer's displacement, made tangent and retracted on every manifold.

        Source: method.md 1.3 and 1.5. One projection on the complement for the displacement, one more where
        ``metric_pre`` asks for it; O(n p (k + p)) a point.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            active = self._active()
            olds = [bucket.stacked() for _, bucket in active]
            grads = [self._riemannian_grads(pair, x) for pair, x in zip(active, olds, strict=True)]
            try:
                self._base_step()
            finally:
                for raw in grads:
                    for p, grad in raw:
                        p.grad = grad
            for (group, bucket), x in zip(active, olds, strict=True):
                with full_precision(x.device):
                    displacement = (bucket.stacked() - x) * _scale(group, x)
                    if group["tangent_post"] == "double":
                        displacement = _canonical_map(bucket.manifold, x, displacement)
                    bucket.write(bucket.moved(x, displacement))
        return loss

    def manifold_of(self, parameter: Tensor) -> Any | None:
        """The manifold that ``parameter`` steps on, None where it is Euclidean."""
        return self._manifolds.get(parameter)

    def __getstate__(self) -> dict[str, Any]:
        """The base class's plain state plus the manifolds, so that copies step on them too."""
        state = super().__getstate__()
        return {**state, "_manifolds": self._manifolds, "_options": self._options, "_decay_asked": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; the buckets are rebuilt at the next step."""
        self._buckets = {}
        super().__setstate__(state)

    def _adopt(self, params: Sequence[Tensor], manifolds: Sequence[Any] | None, *, marked: str) -> None:
        if manifolds is not None and len(manifolds) != len(params):
            raise ValueError(f"a group has {len(params)} parameters and {len(manifolds)} manifolds: they run parallel")
        own = [getattr(p, "manifold", None) for p in params]
        for p, manifold in zip(params, own if manifolds is None else manifolds, strict=True):
            if manifold is None or kind_of(manifold) == "Euclidean":
                if marked not in ("euclidean", ""):
                    raise ValueError(
                        f"the group is marked manifold={marked!r} but the manifold of a parameter of shape "
                        f"{tuple(p.shape)} is missing: build the groups with param_groups(model)"
                    )
                continue
            _check_point(p, manifold)
            self._manifolds[p] = manifold

    def _active(self) -> list[tuple[Group, Bucket]]:
        """The buckets of points that have a gradient; those of the last step are used again where they still fit."""
        active, known = [], self._buckets
        self._buckets = {}
        for group in self.param_groups:
            points = [p for p in group["params"] if p.grad is not None and p in self._manifolds]
            for members in bucketed(Member(p, self._manifolds[p]) for p in points):
                key = tuple(id(member.parameter) for member in members)
                fits = key in known and known[key].is_current(members)
                self._buckets[key] = known[key] if fits else Bucket(members)
                active.append((group, self._buckets[key]))
        return active

    def _riemannian_grads(self, pair: tuple[Group, Bucket], x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Put Riemannian gradients in place of the Euclidean ones, and return those to be put back."""
        group, bucket = pair
        if group["metric_pre"] == "none":
            return []
        raw = [(p, p.grad) for p in bucket.parameters]
        with full_precision(x.device):
            if group["metric_pre"] == "canonical":
                riemannian_grads = _canonical_map(bucket.manifold, x, bucket.stacked_grads())
            else:
                riemannian_grads = bucket.manifold.egrad2rgrad(x, bucket.stacked_grads())
        for p, grad in zip(bucket.parameters, riemannian_grads.unbind(0), strict=True):
            p.grad = grad
        return raw

    def _base_step(self) -> None:
        """The base class's step without torch's hook wrapper, which would run the user's hooks a second time."""
        step = cast(Any, super().step)
        if getattr(step, "hooked", False):
            step.__func__.__wrapped__(self)
        else:
            step()


@cache
def riemannian(optimizer: type[Optimizer]) -> type[Any]:
    """A subclass of ``optimizer`` whose step is Riemannian for every parameter on a manifold.

    Parameters come from `param_groups` (our adapters), as `geoopt.ManifoldParameter` (its manifold is used), or
    plain (they step as ever). Moments stay element-wise in ambient coordinates, as in gu2026eblora.

    Args:
        optimizer: any torch optimizer that evaluates its step once.

    Raises:
        TypeError: for a class that is no optimizer or does not fit, with the reason.

    >>> riemannian(torch.optim.NAdam).__name__
    'RiemannianNAdam'
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"riemannian() takes a torch.optim.Optimizer class, got {optimizer!r}")
    if optimizer.__name__ in REFUSED:
        raise TypeError(f"{optimizer.__name__} cannot be made Riemannian: {REFUSED[optimizer.__name__]}")
    name = f"Riemannian{optimizer.__name__}"
    doc = f"`torch.optim.{optimizer.__name__}` with a Riemannian step; see `riemannian`."
    return type(name, (RiemannianStep, optimizer), {"__doc__": doc, "__module__": __name__})


RiemannianAdamW: Any = riemannian(torch.optim.AdamW)
"""`torch.optim.AdamW` with a Riemannian step; weight decay acts on Euclidean parameters only."""

RiemannianSGD: Any = riemannian(torch.optim.SGD)
"""`torch.optim.SGD` (momentum, Nesterov) with a Riemannian step."""


def _canonical_map(manifold: Any, x: Tensor, g: Tensor) -> Tensor:
    """``P g − x (P g)ᵀ x``: the canonical metric's gradient of g. On a displacement it doubles the rotation."""
    if manifold.width:
        g = project_out(g, manifold.complement.to(g.dtype))
    return g - x @ (g.mT @ x)


def _scale(group: Group, x: Tensor) -> float:
    """Factor on the displacement: 1, sqrt(c / n) as in li2025stella, or sqrt(c / p) as EBLoRA released it."""
    n, p = x.shape[-2:]
    side = {"none": group["reference_width"], "width": n, "official": p}[group["step_scale"]]
    return math.sqrt(group["reference_width"] / side)


def _check_point(p: Tensor, manifold: Any) -> None:
    if p.ndim < 2 and isinstance(manifold, RestrictedStiefel):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} cannot lie on {kind_of(manifold)}: an engine that flattens "
            "parameters (FSDP1, DeepSpeed ZeRO) does not fit; use DDP or FSDP2"
        )
    if p.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"a point on {kind_of(manifold)} is kept in float32 or float64, got {p.dtype}: rounding alone costs "
            "1e-3 of orthonormality; keep the factors in float32 and let autocast handle the products"
        )
    ok, reason = manifold._check_shape(tuple(p.shape), "parameter")
    if not ok:
        raise ValueError(str(reason))
