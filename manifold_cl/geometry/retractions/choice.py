"""A retraction from what a user gives: a name, an object or a function."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from manifold_cl.geometry.retractions.protocol import FunctionRetraction, Retraction
from manifold_cl.geometry.retractions.registry import RETRACTIONS


def as_retraction(choice: Retraction | str | Callable[[Tensor, Tensor], Tensor]) -> Retraction:
    """The retraction for a name, an object, a class, or a function ``f(x, u)``, which is assumed to be of first order.

    A class is made without arguments, as `register_retraction` does.

    Raises:
        ValueError: for an unknown name, with the nearest ones.
        TypeError: for anything that cannot be called.
    """
    if isinstance(choice, str):
        return RETRACTIONS[choice]
    if isinstance(choice, type):
        choice = choice()
    if isinstance(choice, Retraction):
        return choice
    if callable(choice):
        return FunctionRetraction(choice)
    raise TypeError(f"a retraction is a name, a Retraction or a function of (x, u), got {type(choice).__name__}")
