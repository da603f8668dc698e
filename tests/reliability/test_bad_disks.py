"""Disks that are full, read-only, or another file system than that of temporary files: old or new, never half."""

import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from killed_jobs import Job
from sudden_ends import forked
from test_killed_jobs import JOBS, Unbroken, unbroken

Tally = Callable[..., None]
WRITERS = [name for name in JOBS if not name.startswith("run of ")] + ["run of eblora", "run of gpm with a head"]
__all__ = ["unbroken"]  # a fixture


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system in memory at ``folder``; skips where this user may not mount one."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def prepared(job: Job, disk: Path) -> Iterator[Path]:
    """The folder of a prepared job on a file system of its own, mounted at ``disk``."""
    disk.mkdir()
    with mounted(disk, "size=8m"):
        folder = disk / "job"
        folder.mkdir()
        job.prepare(folder)
        yield folder


def fails_or_ends(call: Callable[[], object], folder: Path) -> str:
    """Makes the call in a process: ``complete``, or ``refused`` by an error that names a path of the folder."""
    with tempfile.TemporaryFile() as problem:

        def trying() -> None:
            try:
                call()
            except (OSError, ValueError, RuntimeError, AssertionError) as error:
                os.write(problem.fileno(), f"{type(error).__name__}: {error}".encode())

        assert forked(trying) == 0
        problem.seek(0)
        message = problem.read().decode()
    if message:
        named = str(folder) in message or "ended with code" in message  # a command: its message is on its screen
        assert named, message
    return "refused" if message else "complete"


def old_or_new(name: str, folder: Path, known: Unbroken) -> None:
    """A job that goes on, or starts anew, is at its unbroken end; meanwhile readers found the old state or the new."""
    job, (before, after, _) = JOBS[name][0], known
    if not job.resumes:
        assert job.state(folder) in (before, after, {})
    job.work(folder)
    assert job.state(folder) == after


@pytest.mark.reliability
@pytest.mark.parametrize("room", [0.0, 0.5])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_that_leaves_the_old_files(
    name: str, room: float, unbroken: Callable[[str], Unbroken], tmp_path: Path, tally: Tally
) -> None:
    known, job = unbroken(name), JOBS[name][0]
    disk = tmp_path / "disk"
    with prepared(job, disk) as folder:
        fill(disk, leaving=int(room * known[2].largest))
        tally("bad disks", f"full, {fails_or_ends(lambda: job.work(folder), folder)}")
        (disk / "ballast").unlink()
        old_or_new(name, folder, known)


def fill(disk: Path, *, leaving: int) -> None:
    """Take all room of a disk but some bytes, which are rounded up to blocks."""
    with (disk / "ballast").open("wb") as ballast:
        free = os.statvfs(disk)
        block = free.f_frsize
        ballast.write(bytes(max(0, free.f_bavail - -(-leaving // block)) * block))


@pytest.mark.reliability
@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_on_files_is_an_error_that_leaves_the_old_files(
    name: str, unbroken: Callable[[str], Unbroken], tmp_path: Path, tally: Tally
) -> None:
    known, job = unbroken(name), JOBS[name][0]
    limit = Random(name).randrange(known[2].largest)
    folder = tmp_path / "job"
    folder.mkdir()
    job.prepare(folder)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        job.work(folder)

    tally("bad disks", f"limit on files, {fails_or_ends(limited, folder)}")
    old_or_new(name, folder, known)


@pytest.mark.reliability
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_cannot_be_written_is_an_error(
    name: str, unbroken: Callable[[str], Unbroken], tmp_path: Path, tally: Tally
) -> None:
    known, job = unbroken(name), JOBS[name][0]
    disk = tmp_path / "disk"
    with prepared(job, disk) as folder:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        before = job.state(folder)
        assert fails_or_ends(lambda: job.work(folder), folder) == "refused"
        assert job.state(folder) == before
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        old_or_new(name, folder, known)
    tally("bad disks", "read-only")


@pytest.mark.reliability
@pytest.mark.parametrize("name", WRITERS)
def test_another_file_system_than_that_of_temporary_files_serves(
    name: str, unbroken: Callable[[str], Unbroken], tmp_path: Path, tally: Tally
) -> None:
    known, job = unbroken(name), JOBS[name][0]
    disk = tmp_path / "disk"
    with prepared(job, disk) as folder:
        assert disk.stat().st_dev != Path(tempfile.gettempdir()).stat().st_dev
        job.work(folder)
        assert job.state(folder) == known[1]
    tally("bad disks", "another file system")


@pytest.mark.reliability
def test_moved_folders_of_runs_are_read_on_another_file_system(tmp_path: Path, tally: Tally) -> None:
    job = JOBS["run of eblora"][0]
    (tmp_path / "here").mkdir()
    job.work(tmp_path / "here")
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "size=8m"):
        shutil.move(tmp_path / "here", disk / "there")
        state = job.state(disk / "there")
        job.work(disk / "there")
        assert job.state(disk / "there") == state
    tally("bad disks", "another file system")
