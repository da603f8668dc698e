"""The progress of a study's cells: shares, the time left, and lines where there is no terminal."""

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest

from manifold_cl.cli import progress
from manifold_cl.cli.cells import CellClock, note_of, share_of, show_cells
from manifold_cl.study import Event, StudyPlan, read_plan


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    """Six cells."""
    path = tmp_path / "study.toml"
    path.write_text('stream = "toy:toy_stream"\nseeds = [0, 1, 2]\n[methods.eblora]\n[methods.sequential_merge]\n')
    return read_plan(path)


def at(plan: StudyPlan, cell: int, task: int, phase: str = "train", step: int = 0) -> Event:
    return Event(plan.cells[cell], "progress", "nouns", task, 4, phase, step, 10 if step else 0)


def test_the_time_left_follows_from_the_work_of_this_call(plan: StudyPlan) -> None:
    now = Clock()
    clock = CellClock(6, 2, now)
    clock.update(Event(plan.cells[2], "started"))
    clock.update(at(plan, 2, task=2, phase="prepare"))  # half of it was done by an earlier call
    assert clock.seconds_left() is None
    now.now = 60.0
    clock.update(at(plan, 2, task=3, phase="prepare"))  # a quarter of a cell per minute
    assert clock.seconds_left() == pytest.approx(3.25 * 4 * 60)
    now.now = 120.0
    clock.update(Event(plan.cells[2], "done"))
    assert clock.seconds_left() == pytest.approx(3 * 4 * 60)
    assert clock.line() == "3 of 6 done; about 12 minutes left"


def test_a_cell_that_fails_at_once_counts_no_time(plan: StudyPlan) -> None:
    now = Clock()
    clock = CellClock(6, 0, now)
    clock.update(Event(plan.cells[0], "failed", "no such file"))
    clock.update(at(plan, 1, task=0, phase="prepare"))
    assert clock.seconds_left() is None
    now.now = 60.0
    clock.update(at(plan, 1, task=1, phase="prepare"))  # a quarter of a cell per minute
    assert clock.seconds_left() == pytest.approx(4.75 * 4 * 60)
    clock.update(Event(plan.cells[1], "failed", "diverged"))
    assert clock.seconds_left() == pytest.approx(4 * 4 * 60)


def test_a_pass_for_statistics_does_not_take_a_cell_back(plan: StudyPlan) -> None:
    clock = CellClock(6, 0, Clock())
    event = at(plan, 0, task=1, step=5)
    clock.update(event)
    expected = share_of(event)
    assert expected == pytest.approx((1 + 0.1 + 0.35) / 4)
    clock.update(at(plan, 0, task=1, phase="statistics", step=5))
    assert clock.share(event.cell.name) == expected
    clock.update(at(plan, 0, task=3, phase="evaluate"))
    assert clock.share(event.cell.name) == pytest.approx((3 + 0.85) / 4)


def test_a_line_names_four_cells_and_counts_the_others(plan: StudyPlan) -> None:
    clock = CellClock(6, 0, Clock())
    for index in range(6):
        clock.update(at(plan, index, task=0, step=1 + index))
    parts = clock.line().split("; ")
    assert parts[0] == "0 of 6 done"
    assert parts[-1] == "2 more"
    assert f"{plan.cells[3].name}: task 1 of 4, nouns, train 4/10" in parts
    assert f"{plan.cells[4].name}" not in clock.line()
    assert note_of(Event(plan.cells[0], "started", "node-7")) == "starting on node-7"


def test_a_pipe_gets_lines_before_the_first_cell_ends(plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    monkeypatch.setattr(progress.screen, "_file", written)
    with show_cells(plan, 0) as show:
        event = at(plan, 1, task=1, step=3)  # the message of its start was lost
        show(event)
        deadline = time.monotonic() + 20
        while written.getvalue().count("train 3/10") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        show(replace(event, kind="done", message=""))
    lines = written.getvalue().rstrip().splitlines()  # rich before 14.3 ends with an empty line
    assert sum(event.cell.name in line and line.startswith("0 of 6 done") for line in lines) >= 2
    assert lines[-1] == f"done: {event.cell.name}"
