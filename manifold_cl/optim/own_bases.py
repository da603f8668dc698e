"""Base optimizers of our own: Adam with one second moment per matrix, and Muon with tangent directions.

Their steps do not depend on the basis of a frame: they commute with X → X O for an orthogonal O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.geometry.steepest import msign, tangent_lmo
from manifold_cl.layouts import WHOLE, Layout
from manifold_cl.linalg import Point, Tangent, full_precision, sym
from manifold_cl.rules import validate_share

SECOND_MOMENTS = ("matrix", "element")
DIRECTIONS = ("exact", "spel", "projected", "intrinsic")
NORM_OF = {"exact": "spectral", "intrinsic": "blocks"}
"""Directions that `tangent_lmo` computes, and their norms."""
ADJUSTMENTS = ("none", "original", "match_rms_adamw")


class OwnBase(Optimizer):
    """A step for one parameter after the other.

    A group may hold the ``layout`` of its parameters, whose rows are then spread over ranks.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._advance(p, -p.grad if group["maximize"] else p.grad, group)
        return loss

    def _advance(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class MatrixAdam(OwnBase):
    """Adam whose second moment is the *mean* square of a matrix' gradient, one number per matrix.

    With the mean, and not the sum, ``lr`` is the length of a step per entry, as in element-wise Adam. Parameters with
    fewer than two dimensions keep element-wise moments. Source: becigneul2019riemannian, section 4, with each matrix
    one factor of the product manifold.

    Args:
        params: parameters or groups.
        lr: length of a step per entry.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        second_moment: ``"matrix"``, or ``"element"`` for Adam's own.
        maximize: go up instead of down.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {"second_moment": SECOND_MOMENTS}
    """Options of a group with their values, which `riemannian` validates before each step that finds a new one."""
    OFF_MANIFOLDS: ClassVar[dict[str, Any]] = {"second_moment": "element"}
    """Options that Euclidean parameters step with."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        second_moment: str = "matrix",
        maximize: bool = False,
    ) -> None:
        _validate_adam(lr, betas, eps)
        if second_moment not in SECOND_MOMENTS:
            raise ValueError(f"second_moment is one of {', '.join(SECOND_MOMENTS)}, got {second_moment!r}")
        options = {"lr": lr, "betas": betas, "eps": eps, "second_moment": second_moment, "maximize": maximize}
        super().__init__(params, options)

    def _advance(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        square = grad.square()
        if group["second_moment"] == "matrix" and p.ndim > 1:
            square = layout_in(group).mean(square)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(square)
        state["step"] += 1
        t = float(state["step"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(square, 1 - beta2)
        size = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        p.sub_(state["exp_avg"] / size, alpha=float(group["lr"]) / (1 - beta1**t))


class MatrixMuon(OwnBase):
    """Muon on points: steepest descent under the spectral norm, with a direction that knows the tangent space.

    The parameter is the point: outside `RiemannianMuon`, which retracts, this is no optimizer. Its momentum is a
    vector at the point. Parameters with fewer than two dimensions step as in AdamW.

    Args:
        params: parameters or groups.
        lr: spectral length of a step, of Euclidean parameters AdamW's rate.
        momentum: decay of the average of gradients, in [0, 1).
        nesterov: mix the gradient into the average once more.
        direction: ``"exact"``, ``"spel"``, ``"projected"`` or ``"intrinsic"``, see `RiemannianMuon`.
        adjust: factor on ``lr``: ``"none"``; ``"original"``, √max(1, n/p); ``"match_rms_adamw"``, 0.2 √max(n, p).
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, decoupled.
        maximize: go up instead of down.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {"direction": DIRECTIONS, "adjust": ADJUSTMENTS}
    """Options of a group with their values, which `riemannian` validates before each step that finds a new one."""
    OFF_MANIFOLDS: ClassVar[dict[str, Any]] = {"direction": "adamw"}
    """Options that Euclidean parameters step with."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        *,
        nesterov: bool = False,
        direction: str = "exact",
        adjust: str = "none",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        _validate_adam(lr, betas, eps)
        options = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "direction": direction,
            "adjust": adjust,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after validating its options; "spel" goes to the nearest point, without a tangent part."""
        group = {**self.defaults, **param_group}
        for option, choices in self.CHOICES.items():
            if group[option] not in choices:
                raise ValueError(f"{option} is one of {', '.join(choices)}, got {group[option]!r}")
        for option in ("momentum", "weight_decay"):
            validate_share(option, group[option], zero=True, one=False)
        super().add_param_group(
            {**param_group, "tangent_post": "none"} if group["direction"] == "spel" else param_group
        )

    def _advance(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if p.ndim < 2 or group["direction"] == "adamw":
            self._advance_adamw(p, grad, group)
            return
        state, decay = self.state[p], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(grad, 1 - decay)
        vector = grad.lerp(average, decay) if group["nesterov"] else average
        layout = layout_in(group)
        n, p_ = layout.height(p), p.shape[-1]
        factor = {"none": 1.0, "original": max(1.0, n / p_) ** 0.5, "match_rms_adamw": 0.2 * max(n, p_) ** 0.5}
        rate = float(group["lr"]) * factor[group["adjust"]]
        p.sub_(direction_of(p, vector, group["direction"], layout), alpha=rate)

    def _advance_adamw(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), lr = self.state[p], group["betas"], float(group["lr"])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        t = float(state["step"])
        p.mul_(1 - lr * group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
        size = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        p.sub_(state["exp_avg"] / size, alpha=lr / (1 - beta1**t))


def direction_of(x: Point, vector: Tensor, direction: str, layout: Layout = WHOLE) -> Tangent:
    """The step of spectral length 1, or at most √2 for "intrinsic", that one of `DIRECTIONS` makes of a vector at x."""
    with full_precision(x.device):
        if direction in NORM_OF:
            return tangent_lmo(x, vector, norm=NORM_OF[direction], total=layout.sum_).direction
        if direction == "spel":
            vector = vector - x @ sym(layout.sum_(x.mT @ vector))
        return msign(vector, total=layout.sum_)


def layout_in(group: Mapping[str, Any]) -> Layout:
    """How the rows of this group's parameters are spread over ranks."""
    layout: Layout = group.get("layout", WHOLE)
    return layout


def _validate_adam(lr: float | Tensor, betas: tuple[float, float], eps: float) -> None:
    if not lr >= 0:
        raise ValueError(f"lr is at least 0, got {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas lie in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps is at least 0, got {eps}")
