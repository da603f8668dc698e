"""Shape checks of the geometry in tests, switched off in a test after its first two hundred calls.

A check takes longer than the arithmetic of a small matrix. A training loop calls the same functions with the same
shapes at every step, so that the first step finds a wrong shape.
"""

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

CALLS = 200
"""Calls of checked functions per test; some three steps of an optimizer."""


class Budget:
    """The number of checks that the running test has left."""

    left = CALLS

    def renew(self) -> None:
        """Checks again, for a new test."""
        self.left = CALLS
        jaxtyping.config.update("jaxtyping_disable", False)

    def spend(self) -> None:
        """Counts one check, and switches all checks off when none is left."""
        self.left -= 1
        if self.left <= 0:
            jaxtyping.config.update("jaxtyping_disable", True)


BUDGET = Budget()


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype's check of a function's arguments and result, counted; what jaxtyping calls a type checker."""
    checked = beartype(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        BUDGET.spend()
        return checked(*args, **kwargs)

    return call
