"""Methods of a base optimizer that replace parameters outside of its step, such as ``eval()`` of schedule-free ones.

What they write need not lie on a manifold. Each point is then replaced by the nearest one, and what belongs to the way
back is kept in its state: the point that was trained, and the base optimizer's own values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TRAINED, WRITTEN = "riemannian_trained", "riemannian_written"
"""Keys in a point's state: the point before the swap, and what the base optimizer made of it."""
ROUNDING = 256
"""Units of rounding within which values count as those before the swap: schedule-free bases compute their way back."""


def swapping_methods(base: type[Optimizer], step: type[Any]) -> dict[str, Callable[..., Any]]:
    """Public methods that ``base`` has beyond torch's, each wrapped so that points stay on their manifolds.

    Args:
        base: the class to be made Riemannian.
        step: the class that is put before it; its methods are left alone.
    """
    wrapped = {}
    for name in dir(base):
        method = inspect.getattr_static(base, name)
        known = hasattr(step, name) or hasattr(Optimizer, name)  # zero_grad comes between forward and backward
        if not name.startswith("_") and inspect.isfunction(method) and not known:
            wrapped[name] = _retracting(name, method)
    return wrapped


def _retracting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepper = self.__dict__.get("_riemannian")
        if stepper is None or stepper.stepping or not stepper.manifolds:
            return method(self, *args, **kwargs)
        stepper.stepping = True
        try:
            with torch.no_grad():
                points = [(p, stepper.manifolds[p]) for p in stepper.points(self.param_groups)]
                before = [p.detach().clone() for p, _ in points]
                for p, manifold in points:
                    _unsettle(p, manifold, self.state.get(p, {}))
                given = [p.detach().clone() for p, _ in points]
            back = name == "train" and all((*args, *kwargs.values()))
            try:
                return method(self, *args, **kwargs)
            finally:
                with torch.no_grad():
                    for (p, manifold), was, had in zip(points, before, given, strict=True):
                        _settle(p, manifold, self.state.get(p, {}), was, had, back=back)
        finally:
            stepper.stepping = False

    return call


def forget_swaps(state: Any, points: list[Tensor]) -> None:
    """Drop what belongs to the way back: after a step, it leads nowhere."""
    for p in points:
        for key in (TRAINED, WRITTEN):
            if p in state:
                state[p].pop(key, None)


def _unsettle(p: Tensor, manifold: Any, own: dict[str, Any]) -> None:
    """Give p the base optimizer's own values back, if it still is the point that was made of them."""
    if WRITTEN not in own:
        return
    if torch.equal(p.detach(), _nearest(own[WRITTEN], manifold)):
        p.detach().copy_(own[WRITTEN])
    else:  # somebody has loaded another point since
        del own[TRAINED], own[WRITTEN]


def _settle(p: Tensor, manifold: Any, own: dict[str, Any], was: Tensor, given: Tensor, *, back: bool) -> None:
    """Put p on its manifold after a method that was ``given`` a value and may have written another.

    Args:
        p: the point.
        manifold: of the point.
        own: its state.
        was: its value before the method.
        given: what the method found.
        back: whether the method leads back to the point that was trained.
    """
    new = p.detach()
    if torch.equal(new, given):
        new.copy_(was)
    elif TRAINED in own and (back or _near(new, own[TRAINED])):
        new.copy_(own[TRAINED])
        del own[TRAINED], own[WRITTEN]
    else:
        if own:  # a base optimizer asks whether a state is empty
            own.setdefault(TRAINED, was)
            own[WRITTEN] = new.clone()
        new.copy_(_nearest(new, manifold))


def _near(a: Tensor, b: Tensor) -> bool:
    scale = max(1.0, float(b.abs().max()))
    return float((a - b).abs().max()) <= ROUNDING * torch.finfo(a.dtype).eps * scale


def _nearest(values: Tensor, manifold: Any) -> Tensor:
    nearest: Tensor = manifold.projx(values.double()).to(values.dtype)
    return nearest
