"""What training loops take beside the step: an optimizer for Trainer, and clipping in Riemannian norms."""

from __future__ import annotations

from inspect import Signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifold_cl.layouts import is_dtensor
from manifold_cl.optim.groups import param_groups
from manifold_cl.optim.riemannian import RiemannianStep, riemannian


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
