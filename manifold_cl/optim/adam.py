"""Adam with one second moment per matrix: its steps do not depend on the basis of a frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

SECOND_MOMENTS = ("matrix", "element")


class MatrixAdam(Optimizer):
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
        if not lr >= 0:
            raise ValueError(f"lr is at least 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas lie in [0, 1), got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps is at least 0, got {eps}")
        if second_moment not in SECOND_MOMENTS:
            raise ValueError(f"second_moment is one of {', '.join(SECOND_MOMENTS)}, got {second_moment!r}")
        options = {"lr": lr, "betas": betas, "eps": eps, "second_moment": second_moment, "maximize": maximize}
        super().__init__(params, options)

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
        state, (beta1, beta2) = self.state[p], group["betas"]
        square = grad.square()
        if group["second_moment"] == "matrix" and p.ndim > 1:
            square = square.mean(dim=(-2, -1), keepdim=True)
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
