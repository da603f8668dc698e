"""Any torch optimizer, its step made Riemannian.

The base optimizer computes its ordinary step, element-wise moments and all. What it did to a parameter on a
manifold is then read off as a displacement, made tangent, and retracted. Projecting the displacement, rather
than only the gradient, is what keeps the constraint: Adam's element-wise scaling turns a tangent gradient into
a step that is not tangent.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manifold_cl.optim.adam import MatrixAdam
from manifold_cl.optim.groups import OnManifolds
from manifold_cl.optim.refusals import refuse_base
from manifold_cl.optim.step import RiemannianStep
from manifold_cl.optim.swaps import swapping_methods

__all__ = ["OnManifolds", "RiemannianAdam", "RiemannianAdamW", "RiemannianSGD", "RiemannianStep", "riemannian"]


@cache
def riemannian(optimizer: type[Optimizer]) -> type[Any]:
    """A subclass of ``optimizer`` whose step is Riemannian for every parameter on a manifold.

    Parameters come from `param_groups` (our adapters), as `geoopt.ManifoldParameter` (its manifold is used), or
    plain (they step as ever). Moments stay element-wise in ambient coordinates, as in gu2026eblora, unless
    ``moments="transport"`` carries averages of gradients along.

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
    refuse_base(optimizer)
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
    """Adam with one second moment for each matrix and transported averages; see `MatrixAdam`.

    The step depends on a frame only through what it spans and how: with X → X O for an orthogonal O, the new points
    are related by the same O. Element-wise Adam has no such property. Euclidean parameters step as in Adam.

    Args:
        params: as for `riemannian`.
        lr: root mean square of a step's entries.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        second_moment: ``"matrix"``, or ``"element"`` for Adam's own on points too.
        moments: ``"transport"``, or ``"ambient"``.
        **options: of the step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        second_moment: str = "matrix",
        moments: str = "transport",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, second_moment=second_moment, moments=moments, **options)


def __getattr__(name: str) -> type[Any]:
    """The Riemannian form of any optimizer of torch.optim by name, which is how pickle finds it again."""
    base = getattr(torch.optim, name.removeprefix("Riemannian"), None)
    if not name.startswith("Riemannian") or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return riemannian(base)
