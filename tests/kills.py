"""Processes that are killed in the middle of a write, or interrupted."""

import os
import signal
from collections.abc import Callable


def killed_at(number: int, call: Callable[[], None]) -> bool:
    """Runs ``call`` in a process that is killed after its rename of that number; whether it came that far."""
    child = os.fork()
    if child == 0:
        count = 0
        for name, original in (("replace", os.replace), ("rename", os.rename)):

            def renaming(old: object, new: object, *, inner: Callable[..., None] = original) -> None:
                nonlocal count
                inner(old, new)
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(os, name, renaming)
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def hear_interrupts() -> None:
    """As ``preexec_fn``: a parent in the background has Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
