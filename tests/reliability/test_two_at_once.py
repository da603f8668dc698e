"""Two processes on one folder, and clocks that jump: one process writes, and no number depends on the time."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from killed_jobs import Job, run_of, search_run, study_run
from test_killed_jobs import JOBS, Unbroken, unbroken

from manifold_cl.files import FileError

Tally = Callable[..., None]
SHARED = {"run of eblora": run_of("eblora"), "study": study_run(), "search": search_run()}
WRITE = ("adapter save", "adapter export", "memory save", "table, csv", "table, parquet", "report")
__all__ = ["unbroken"]  # a fixture
REFUSED = 7
"""Exit code of a process that another one keeps out."""


def at_once(jobs: list[Callable[[], object]]) -> list[int]:
    """Exit codes of processes that make these calls at the same time."""
    children = []
    for call in jobs:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                call()
                code = 0
            except FileError as error:
                code = REFUSED if "another process is at work" in str(error) else 1
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SHARED)
def test_of_processes_in_one_folder_one_works_and_the_others_are_told(
    name: str, seed: int, unbroken: Callable[[str], Unbroken], tmp_path: Path, tally: Tally
) -> None:
    job, (_, after, extent) = SHARED[name], unbroken(name)
    job.prepare(tmp_path)
    draw = Random(f"{name} {seed}")

    def late(pause: float) -> Callable[[], object]:
        return lambda: (time.sleep(pause), job.work(tmp_path))

    codes = at_once([late(draw.uniform(0, extent.seconds / 2)) for _ in range(3)])
    assert set(codes) <= {0, REFUSED}
    assert 0 in codes
    state = job.state(tmp_path)
    assert state == after
    tally("processes at once", name, len(codes))


@pytest.mark.reliability
@pytest.mark.parametrize("name", WRITE)
def test_of_two_writers_of_one_file_one_is_the_last(
    name: str, unbroken: Callable[[str], Unbroken], tmp_path: Path, tally: Tally
) -> None:
    job: Job = JOBS[name][0]
    _, after, _ = unbroken(name)
    job.prepare(tmp_path)
    codes = at_once([lambda: [job.work(tmp_path) for _ in range(3)]] * 3)
    state = job.state(tmp_path)
    assert codes == [0, 0, 0]
    assert state == after
    tally("processes at once", name, 3)


@pytest.mark.reliability
@pytest.mark.parametrize("jump", [-3e7, 3e7])
@pytest.mark.parametrize("name", ["run of eblora", "study", "search", "training log, csv"])
def test_no_number_depends_on_a_clock_that_jumps(
    name: str,
    jump: float,
    unbroken: Callable[[str], Unbroken],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """The time of day jumps by a year at every call; the clocks of durations jump forward, as after a suspension."""
    job, (_, after, _) = JOBS[name][0], unbroken(name)
    job.prepare(tmp_path)
    calls = 0

    def jumping(original: Callable[[], float], size: float) -> Callable[[], float]:
        def now() -> float:
            nonlocal calls
            calls += 1
            return type(original())(original() + calls * size)

        return now

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping(time.time, jump))
        patch.setattr(time, "time_ns", jumping(time.time_ns, jump * 1e9))
        for clock in ("monotonic", "perf_counter"):
            patch.setattr(time, clock, jumping(getattr(time, clock), abs(jump)))
        job.work(tmp_path)
    state = job.state(tmp_path)
    assert state == after
    assert calls or name.startswith("training log")
    tally("clocks that jump", name)
