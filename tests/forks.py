"""Processes of tests as forks of this one: they have imported all that a new one takes seconds of CPU time for.

A fork has memory, pipes, a session and an exit code of its own. Workers started as users start them are tested in
`tests/study`. Where OpenMP has threads, a fork would wait for them for ever: a new process starts instead.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO, Any, ClassVar, NoReturn
from unittest.mock import patch

import torch
import torch.multiprocessing as mp

from manifold_cl.study import worker

WORKER = ["-m", "manifold_cl.study.worker"]


def can_fork() -> bool:
    """Whether a fork of this process can compute: not with threads of OpenMP, nor with those of Ray (gRPC)."""
    return sys.platform == "linux" and torch.get_num_threads() == 1 and "ray" not in sys.modules


def start_ranks(work: Callable[..., None], arguments: Sequence[Any], count: int) -> None:
    """`torch.multiprocessing.spawn` by forks: ``work(rank, *arguments)`` in `count` processes, until all have ended."""
    if not can_fork():
        mp.spawn(work, tuple(arguments), nprocs=count)
        return
    with _quiet():
        mp.start_processes(_rank, (work, *arguments), nprocs=count, start_method="fork")


@contextmanager
def forked_workers() -> Iterator[None]:
    """Cells of studies run in forks of this process, and estimates do not measure what a new one would import."""
    with (
        patch("manifold_cl.study.processes.subprocess", SimpleNamespace(Popen=_popen, PIPE=subprocess.PIPE)),
        patch("manifold_cl.study.estimate.subprocess", SimpleNamespace(run=lambda *_, **__: None)),
    ):
        yield


def _popen(command: Sequence[str], **options: Any) -> Any:
    assert list(command[1:3]) == WORKER
    if not can_fork():
        return subprocess.Popen(command, **options)
    return WorkerFork(command[3:], environment=options["env"], errors=options["stderr"])


class WorkerFork:
    """What a study uses of `subprocess.Popen`, for a worker that is a fork."""

    ours: ClassVar[list[int]] = []
    """This process's ends of all pipes: a worker ends when the last copy of its own is closed."""

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str], errors: IO[str]) -> None:
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        self.ours += [ours_in, ours_out]
        self.returncode: int | None = None
        self.lock = threading.Lock()
        with _quiet():
            self.pid = os.fork()
        if not self.pid:
            _work(arguments, environment, (theirs_in, theirs_out, errors.fileno()), self.ours)
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin = _Pipe(ours_in, "w")
        self.stdout = _Pipe(ours_out, "r")

    def wait(self) -> int:
        """The exit code, or minus the signal, once the worker has ended."""
        with self.lock:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.returncode

    def kill(self) -> None:
        """End it, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


class _Pipe:
    """One end of a pipe as text."""

    def __init__(self, number: int, mode: str) -> None:
        self.number, self.file = number, os.fdopen(number, mode, encoding="utf-8", errors="replace")

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def close(self) -> None:
        """Close it; its number may be another file's from then on."""
        if not self.file.closed:
            WorkerFork.ours.remove(self.number)
            self.file.close()


def _work(
    arguments: Sequence[str], environment: Mapping[str, str], streams: tuple[int, int, int], others: Sequence[int]
) -> NoReturn:
    """Run the worker in this fork, and end it."""
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for number in (*streams[:2], *others):
            os.close(number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(environment)
        _as_new()
        sys.argv = ["worker", *arguments]
        worker.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    _as_new()
    work(rank, *arguments)


def _as_new() -> None:
    """Forget the warnings and the log that pytest or the command has set up."""
    warnings.resetwarnings()
    warnings.showwarning = warnings._showwarning_orig  # type: ignore[attr-defined]
    for logger in (logging.getLogger(), logging.getLogger("manifold_cl")):
        logger.handlers.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Python 3.12 warns of forks beside threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
