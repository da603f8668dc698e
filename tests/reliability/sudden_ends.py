"""Calls in forked processes that end suddenly: by a signal after a time, before a change of the disk, or in a write."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

PATIENCE = 120.0
"""Seconds after which a child that should have ended counts as one that hangs."""
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
"""Audit events before a change of the disk; files opened for writing and flushes are counted as well."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Call = Callable[[], object]


@dataclass(frozen=True)
class Extent:
    """What an unbroken call takes: seconds, changes of the disk, bytes of its largest file."""

    seconds: float
    changes: int
    largest: int


@dataclass(frozen=True)
class Moment:
    """When a process ends: after seconds, before a change of the disk, or where a file would exceed a size."""

    kind: Literal["seconds", "change", "bytes"]
    at: float

    @classmethod
    def draw(cls, draw: Random, extent: Extent) -> "Moment":
        """A random moment within an extent; each kind is as likely."""
        kind = draw.choice(("seconds", "change", "bytes"))
        if kind == "seconds":
            return cls("seconds", draw.uniform(0, extent.seconds))
        if kind == "change":
            return cls("change", draw.randrange(extent.changes) + 1)
        return cls("bytes", draw.randrange(extent.largest))


def measured(call: Call, folder: Path) -> Extent:
    """The extent of a call that writes below ``folder``, in a process of its own."""
    with tempfile.TemporaryFile() as counted:
        begun = time.monotonic()

        def counting() -> None:
            count = count_changes(lambda number: None)
            call()
            os.write(counted.fileno(), str(count[0]).encode())

        assert forked(counting) == 0
        seconds = time.monotonic() - begun
        counted.seek(0)
        changes = int(counted.read())
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Extent(seconds, changes, max(sizes))


def killed(call: Call, moment: Moment) -> bool:
    """Whether a process that makes the call ended at the moment; False if the call was complete before."""

    def ending() -> None:
        if moment.kind == "change":
            count_changes(lambda number: number >= moment.at and os.kill(os.getpid(), signal.SIGKILL))
        elif moment.kind == "bytes":  # the kernel ends a process in the middle of the write that exceeds the limit
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment.at), resource.RLIM_INFINITY))
        call()

    return forked(ending, kill_after=moment.at if moment.kind == "seconds" else None) < 0


def count_changes(before: Callable[[int], Any]) -> list[int]:
    """The number of changes of the disk by this process from now on; ``before`` is called with each number."""
    count = [0]

    def change() -> None:
        count[0] += 1
        before(count[0])

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            change()

    original = os.fsync

    def flushing(file: Any) -> None:
        change()
        original(file)

    os.fsync = flushing
    sys.addaudithook(audited)  # cannot be removed: for processes that end soon
    return count


def forked(call: Call, *, kill_after: float | None = None) -> int:
    """Exit code of a child that makes the call, minus the signal that ended it; AssertionError if the call fails."""
    with tempfile.TemporaryFile() as problem:
        child = os.fork()
        if child == 0:
            _run(call, problem.fileno())
        deadline = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() >= deadline:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                assert kill_after is not None, f"the call did not end within {PATIENCE:g} s"
                break
            time.sleep(0.001)
        code = os.waitstatus_to_exitcode(ended[1])
        problem.seek(0)
        assert code <= 0, problem.read().decode()
        return code


def _run(call: Call, problem: int) -> None:
    """Make the call in a child, which ends here."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    try:
        call()
    except BaseException:
        os.write(problem, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)
