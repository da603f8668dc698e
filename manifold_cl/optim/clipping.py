"""Gradient clipping in the norm that the step sees: of Riemannian gradients, not of Euclidean ones."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_cl.optim.layout import is_dtensor
from manifold_cl.optim.step import RiemannianStep


@torch.no_grad()
def clip_riemannian_grad_norm_(
    optimizer: RiemannianStep, max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """The norm of all gradients before clipping, Riemannian on manifolds; scales every ``p.grad`` down to ``max_norm``.

    `torch.nn.utils.clip_grad_norm_` measures Euclidean gradients, whose normal part, which no step follows, can be
    most of them: it then shortens steps that were short already. Costs one more projection of the gradients.

    Args:
        optimizer: whose parameters' gradients are measured, each in the metric of its manifold.
        max_norm: the largest norm that is left alone.
        error_if_nonfinite: raise instead of scaling by NaN.

    Raises:
        TypeError: for an optimizer that is not Riemannian.
        ValueError: for a bound that is not positive.
        RuntimeError: for a norm that is not finite, if asked to; nothing is scaled then.
    """
    if not isinstance(optimizer, RiemannianStep):
        raise TypeError(
            f"clip_riemannian_grad_norm_ takes a Riemannian optimizer, which knows the manifolds, got "
            f"{type(optimizer).__name__}"
        )
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
