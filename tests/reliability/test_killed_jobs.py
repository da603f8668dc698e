"""Processes killed at random moments: a run, a study or a search goes on to the same bits, a file is old or new."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from killed_jobs import (
    METHODS,
    Job,
    State,
    adapters_exported,
    adapters_merged,
    adapters_saved,
    memory_saved,
    report_written,
    run_of,
    search_run,
    study_run,
    subspaces_built,
    table_written,
    training_watched,
)
from sudden_ends import Extent, Moment, killed

JOBS: dict[str, tuple[Job, int]] = {
    **{f"run of {name}": (run_of(name), 20 if name == "eblora" else 8) for name in METHODS},
    "run of gpm with a head": (run_of("gpm", additional=True), 8),
    "study": (study_run(), 20),
    "search": (search_run(), 12),
    "adapter save": (adapters_saved(), 20),
    "adapter export": (adapters_exported(), 20),
    "adapter merge": (adapters_merged(), 10),
    "memory save": (memory_saved(), 10),
    "subspace build": (subspaces_built(), 20),
    "subspace growth": (subspaces_built(grown=True), 10),
    "training log, parquet": (training_watched("parquet"), 10),
    "training log, csv": (training_watched("csv"), 10),
    **{f"table, {ending}": (table_written(ending), 6) for ending in ("csv", "json", "parquet")},
    "report": (report_written(), 5),
}
"""Jobs by name, each with the number of its kills."""
CHAIN = 3
"""Largest number of kills in a row of one job that goes on."""

Unbroken = tuple[State, State, Extent]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Unbroken]:
    """States and extent of a job that nobody kills, computed once per job."""
    known: dict[str, Unbroken] = {}

    def of(name: str) -> Unbroken:
        if name not in known:
            known[name] = JOBS[name][0].unbroken(tmp_path_factory.mktemp("unbroken") / "job")
        return known[name]

    return of


def kill_and_go_on(name: str, seed: int, folder: Path, unbroken: Unbroken) -> int:
    """Kills one job once, or several times in a row if it goes on, and compares its end with the unbroken one."""
    job, (before, after, extent), draw = JOBS[name][0], unbroken, Random(f"{name} {seed}")
    folder.mkdir()
    job.prepare(folder)
    wanted = draw.randint(1, CHAIN) if job.resumes else 1
    kills = 0
    while kills < wanted:
        if not killed(lambda: job.work(folder), Moment.draw(draw, extent)):
            assert job.state(folder) == after
            break
        kills += 1
        if not job.resumes:
            assert job.state(folder) in (before, after, {})
    job.work(folder)
    found = job.state(folder)
    assert found.keys() == after.keys()
    differing = [key for key, value in after.items() if found[key] != value]
    assert not differing
    return kills


@pytest.mark.reliability
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_loses_nothing(
    name: str, unbroken: Callable[[str], Unbroken], tmp_path: Path, tally: Callable[..., None]
) -> None:
    seed = kills = 0
    while kills < JOBS[name][1]:
        before = kills
        kills += kill_and_go_on(name, seed, tmp_path / f"{seed}", unbroken(name))
        tally("kills", name, kills - before)
        seed += 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run of eblora", "adapter export", "table, csv"])
def test_a_sample_of_killed_jobs_loses_nothing(name: str, unbroken: Callable[[str], Unbroken], tmp_path: Path) -> None:
    """Other seeds than those of the complete suite, which is too long for every change."""
    kills = sum(kill_and_go_on(name, seed, tmp_path / f"{seed}", unbroken(name)) for seed in range(100, 105))
    assert kills
