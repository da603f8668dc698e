"""Garbage collection of commands that read, compute and draw once."""

from __future__ import annotations

import atexit
import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

RARELY = 50_000
"""Objects that are made between two collections. Python's own number is 700."""

P = ParamSpec("P")
Result = TypeVar("Result")


def collecting_rarely(command: Callable[P, Result]) -> Callable[P, Result]:
    """Decorates a command: garbage is collected after `RARELY` new objects.

    Imports and figures make millions of objects that stay, and each collection visits them again: a tenth of the
    time of such a command. Memory without reference cycles, such as tensors, is freed at once as before. When the
    process ends, the operating system frees all of it: a last collection would take as long again.
    """

    @functools.wraps(command)
    def collecting(*args: P.args, **options: P.kwargs) -> Result:
        _freeze_at_exit()
        before = gc.get_threshold()
        gc.set_threshold(RARELY, *before[1:])
        try:
            return command(*args, **options)
        finally:
            gc.set_threshold(*before)

    return collecting


@functools.cache
def _freeze_at_exit() -> None:
    """Leave all objects out of the collections that end the process, once per process."""
    atexit.register(gc.freeze)
