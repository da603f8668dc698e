"""A study runs its cells in processes of their own, and goes on after any of them was stopped."""

import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from filelock import FileLock
from forks import forked_workers
from records import editable

from manifold_cl import RunRecord
from manifold_cl.files import FileError
from manifold_cl.study import Cell, Estimate, Event, Study, StudyPlan, estimate, read_plan, time_left, validate_on_model
from manifold_cl.study.processes import _listen
from manifold_cl.study.worker import run_cell

Write = Callable[..., Path]
ONE_SEED = ("seeds = [0, 1]", "seeds = [0]")
FIRST = ("sequential_merge-seed0", "ours-seed0")
"""The cells of that seed: a process each, which imports torch."""


def numbers(folder: Path) -> dict[str, tuple[object, ...]]:
    """What must not depend on how often a study was stopped."""
    records = {path.parent.name: RunRecord.load(path.parent) for path in sorted(folder.glob("cells/*/record.json"))}
    return {name: (r.status, r.losses, r.accuracy, r.zero_shot, r.metrics, r.stored) for name, r in records.items()}


@pytest.mark.slow
def test_cells_run_in_processes_to_the_numbers_of_plain_runs(config: Write, straight: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    whole = Study(read_plan(config(ONE_SEED)), tmp_path / "out")
    assert len(whole.pending()) == 2
    assert whole.run(on_event=events.append) == []
    assert numbers(tmp_path / "out") == {name: numbers(straight)[name] for name in FIRST}
    kinds = [event.kind for event in events]
    assert (kinds.count("started"), kinds.count("done"), kinds.count("failed")) == (2, 2, 0)
    assert {event.phase for event in events if event.kind == "progress"} >= {"zero-shot", "train", "evaluate"}
    assert whole.pending() == []
    assert StudyPlan.load(tmp_path / "out") == whole.plan
    assert whole.run(on_event=events.append) == []  # nothing left: nothing runs
    assert len([event for event in events if event.kind == "started"]) == 2
    record = whole.records()[whole.plan.cells[1]]
    assert record.config["threads"] == record.machine["threads"] == 1
    assert record.stored["updates"] > 0
    assert record.stored["state"] > 0


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_numbers(config: Write, straight: Path, tmp_path: Path) -> None:
    """The supervisor is killed outright; its workers end with it, and nobody writes behind the next one's back."""
    out, path = tmp_path / "out", config(ONE_SEED)
    script = f"from manifold_cl.study import *; Study(read_plan({str(path)!r}), {str(out)!r}).run()"
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not list(out.glob("cells/*/tasks/01-first/learned.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for cell in out.glob("cells/*"):
        if cell.is_dir():
            with FileLock(cell.with_suffix(".lock"), timeout=20):  # the worker is gone, or goes now
                pass
    assert len(Study(read_plan(path), out).pending()) > 1
    with forked_workers():
        assert Study(read_plan(path), out).run() == []
    assert numbers(out) == {name: numbers(straight)[name] for name in FIRST}


def test_cells_whose_labels_share_what_is_before_a_dot_do_not_wait_for_each_other(
    config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifold_cl.study.worker.PATIENCE", 0.1)
    more = '\n[methods."zero-0.9"]\nmethod = "zero_shot"\n[methods."zero-0.8"]\nmethod = "zero_shot"\n'
    plan = read_plan(config(more=more))
    inner: list[str] = []

    def meanwhile(_: object) -> None:
        if not inner:
            inner.append("begun")
            inner.append(run_cell(plan, plan.cell("zero-0.8-seed1"), tmp_path).status)

    assert run_cell(plan, plan.cell("zero-0.9-seed0"), tmp_path, on_progress=meanwhile).status == "complete"
    assert inner == ["begun", "complete"]


PRINTED = r"""
import sys
out = sys.stdout.buffer
out.write(b"3\nnull\n[\"a\"]\n\"text\"\n{\"progress\": 1}\n{\"progress\": {\"task\": \"t\"}}\n{\"note\": [1]}\n{}\n\n")
out.write(b"\xff\xfe broken\n" + b"[" * 100000 + b"\n" + b"1" * 5000 + b"\n")
out.write(b'{"error": "the reason"}\n{"loss": 0.5}\n{"note": "a word"}\n')
out.flush()
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("code", "last"), [(0, ("done", "")), (4, ("failed", "the reason"))])
def test_what_a_stream_prints_is_ignored(code: int, last: tuple[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRINTED, str(code)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", errors="replace")
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    _listen(process, Cell("a", "default", 0), tmp_path / "a.log", events)
    found = [events.get_nowait() for _ in range(events.qsize())]
    assert [(event.kind, event.message) for event in found] == [("started", ""), ("note", "a word"), last]


def test_a_listener_that_breaks_still_says_that_the_cell_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise MemoryError("as if")

    monkeypatch.setattr("manifold_cl.study.processes._parsed", broken)
    process = subprocess.Popen(
        [sys.executable, "-c", "print(1)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with pytest.raises(MemoryError):
        _listen(process, Cell("a", "default", 0), tmp_path / "a.log", events)
    assert [events.get_nowait().kind for _ in range(events.qsize())][-1] in ("done", "failed")


def test_a_damaged_plan_asks_for_one_file_and_keeps_the_cells(config: Write, tmp_path: Path) -> None:
    whole = Study(read_plan(config()), tmp_path / "out")
    whole.plan.save(whole.folder)
    (whole.folder / "study.json").write_text('{"format": "manifold_cl.st')
    with pytest.raises(FileError, match=r"study\.json is damaged .*: delete this one file, and the command writes it"):
        whole.validate()
    (whole.folder / "study.json").unlink()
    whole.validate()


BROKEN = f"""
import sys
sys.path.insert(0, {str(Path(toy.__file__).parent)!r})
import toy

def build(**options):
    stream = toy.toy_stream(**options)
    second = stream.tasks[1]
    whole = second.loss
    second.loss = lambda model, batch: whole(model, batch) * float("inf")
    return stream
"""


def test_a_cell_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    path = tmp_path / "study.toml"
    path.write_text('stream = "broken.py:build"\n[methods.sequential_merge]\nalpha = 8.0\n[methods.zero_shot]\n')
    whole = Study(read_plan(path.with_name("study.toml")), tmp_path / "out")
    with forked_workers():
        failures = whole.run()
    assert [failure.cell.name for failure in failures] == ["sequential_merge-seed0"]
    assert failures[0].reason.startswith("the loss of second became inf at step 1: lower the learning rate")
    assert [cell.name for cell in whole.pending()] == ["sequential_merge-seed0"]
    assert whole.records()[whole.pending()[0]].done == 1


def test_a_folder_of_another_study_is_refused(config: Write, straight: Path, tmp_path: Path) -> None:
    whole = Study(read_plan(config(("energy = 0.9", "energy = 0.8"), ("epochs = 2", "epochs = 3"))), straight)
    said = r"another configuration: methods\.ours\.options\.energy: 0\.9 there, 0\.8 here; training\.epochs: 2 there"
    with pytest.raises(FileError, match=said):
        whole.validate()
    with pytest.raises(FileError, match="another configuration"):
        whole.validate(extend=True)
    Study(
        read_plan(config(('name = "toy"', 'name = "other"'), ("processes = 2", "processes = 1"))), straight
    ).validate()


@pytest.mark.parametrize("status", ["complete", "running"])
def test_a_cell_that_ran_with_other_defaults_is_refused_by_name(
    status: str, config: Write, straight: Path, tmp_path: Path
) -> None:
    """The plan's file names neither ``source`` nor ``batch_size``: what they were is in the record only."""
    out = shutil.copytree(straight, tmp_path / "out")
    Study(read_plan(config()), out).validate()
    path = out / "cells" / "ours-seed1" / "record.json"
    record = editable(path)
    record["status"], record["config"]["source"], record["config"]["batch_size"] = status, "gradient", 8
    path.write_text(json.dumps(record))
    said = (
        r"runs of another configuration: cells/ours-seed1 \(batch_size: 8 there, 16 here, "
        r"source: 'gradient' there, 'sensitivity' here\): delete those folders"
    )
    for extend in (False, True):
        with pytest.raises(FileError, match=said):
            Study(read_plan(config()), out).validate(extend=extend)
    with pytest.raises(FileError, match=said):
        Study(read_plan(config()), out).run()


def test_a_stream_is_read_once(config: Write, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(config())
    monkeypatch.setattr("manifold_cl.study.plan.open_named", lambda *_: pytest.fail("read a second time"))
    Study(plan, straight).validate()
    validate_on_model(plan)


def test_cells_are_looked_at_where_the_plan_was_lost(config: Write, straight: Path, tmp_path: Path) -> None:
    out = shutil.copytree(straight, tmp_path / "out")
    (out / "study.json").unlink()
    Study(read_plan(config()), out).validate()
    said = r"cells/sequential_merge-seed0 \(epochs: 2 there, 3 here\); .* and 1 more"
    with pytest.raises(FileError, match=said):
        Study(read_plan(config(("epochs = 2", "epochs = 3"))), out).validate()
    assert not (out / "study.json").exists()


def test_a_study_grows_only_on_request(config: Write, straight: Path) -> None:
    more = read_plan(config(("seeds = [0, 1]", "seeds = [0, 1, 2]"), more="\n[methods.zero_shot]\n"))
    with pytest.raises(FileError, match=r"another configuration \(--extend adds cells to it\): methods\.zero_shot"):
        Study(more, straight).validate()
    many = "".join(f"\n[methods.m{number}]\nmethod = 'zero_shot'\n" for number in range(9))
    with pytest.raises(FileError, match=r"methods\.m5\.method: 'unset' there, 'zero_shot' here and 3 more$"):
        Study(read_plan(config(more=many)), straight).validate()
    Study(more, straight).validate(extend=True)
    assert [cell.name for cell in Study(more, straight).pending()] == [
        "zero_shot-seed0",
        "zero_shot-seed1",
        "sequential_merge-seed2",
        "ours-seed2",
        "zero_shot-seed2",
    ]
    with pytest.raises(FileError, match=r"seeds: \[0, 1\] there, \[0\] here"):
        Study(read_plan(config(("seeds = [0, 1]", "seeds = [0]"))), straight).validate(extend=True)


def test_what_is_said_of_a_search_may_change(config: Write, straight: Path, tmp_path: Path) -> None:
    """One more losing trial, or a file that was moved, changes no number; the study notes the new words."""
    out = shutil.copytree(straight, tmp_path / "out")
    plan = read_plan(config())
    search = {"file": "found.json", "stream": "text-val", "trials": 3, "mfn": 85.5}
    for said in (search, {**search, "file": "moved/found.json", "trials": 4}, None):
        entries = (replace(plan.entries[0], search=said), *plan.entries[1:])
        whole = Study(replace(plan, entries=entries), out)
        assert StudyPlan.load(out).changes(whole.plan) == []
        whole.validate()
        whole.run()
        assert StudyPlan.load(out).entries[0].search == said
        grown = replace(whole.plan, seeds=(0, 1, 2))
        assert grown.extends(plan)
        Study(grown, out).validate(extend=True)


def test_two_calls_do_not_work_on_one_folder(config: Write, tmp_path: Path) -> None:
    whole = Study(read_plan(config()), tmp_path / "out")
    whole.folder.mkdir()
    with FileLock(whole.folder / "study.lock"), pytest.raises(FileError, match="another process is at work on"):
        whole.run()


def test_damaged_files_are_noted_and_the_last_good_ones_used(
    config: Write, straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = read_plan(config())
    cell = plan.cell("ours-seed0")
    run_cell(plan, cell, tmp_path)
    place = tmp_path / "cells" / cell.name
    record = editable(place / "record.json")
    (place / "record.json").write_text(json.dumps({**record, "status": "running"}))
    file = next(place.glob("tasks/02-*/adapter.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])
    run_cell(plan, cell, tmp_path)
    assert "going back to task 1, the last intact one" in caplog.text
    assert numbers(tmp_path)[cell.name] == numbers(straight)[cell.name]

    (place / "record.json").write_text('{"format": "manifold_cl.rec')
    run_cell(plan, cell, tmp_path)
    assert "set aside as record.damaged.json, the cell starts anew" in caplog.text
    assert (place / "record.damaged.json").read_text() == '{"format": "manifold_cl.rec'
    assert numbers(tmp_path)[cell.name] == numbers(straight)[cell.name]


def test_estimates_come_from_what_is_done_or_from_measuring(config: Write, straight: Path) -> None:
    plan = read_plan(config(("seeds = [0, 1]", "seeds = [0, 1, 2]"), more="\n[methods.joint]\n[methods.zero_shot]\n"))
    told: list[str] = []
    with forked_workers():
        found = {e.label: e for e in estimate(plan, Study(plan, straight).records(), on_label=told.append)}
    assert set(found) == {"sequential_merge", "ours", "joint", "zero_shot"}
    assert told == ["joint", "zero_shot"]
    assert found["ours"].source == "median of 2 done"
    assert found["joint"].source == "measured"
    assert 0 < found["zero_shot"].seconds < found["joint"].seconds < 60


STEADY = f"""
import sys, time
sys.path.insert(0, {str(Path(toy.__file__).parent)!r})
import toy

def slowed(function, seconds):
    def slow(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)
    return slow

def build(**options):
    stream = toy.toy_stream(**options)
    for task in stream.tasks:
        task.loss, task.scores = slowed(task.loss, 0.05), slowed(task.scores, 0.1)
    return stream
"""


@pytest.mark.slow
def test_an_estimate_of_known_costs_is_right(tmp_path: Path) -> None:
    """A step takes 0.05 s and an evaluation of a task 0.1 s; joint learns all three tasks at once."""
    (tmp_path / "steady.py").write_text(STEADY)
    (tmp_path / "study.toml").write_text(
        'stream = "steady.py:build"\nrank = 4\n[training]\nepochs = 3\naccumulation = 2\n'
        "[methods.sequential_merge]\n[methods.joint]\n[methods.zero_shot]\n"
    )
    plan = read_plan(tmp_path / "study.toml")
    found = {e.label: e for e in estimate(plan, {})}
    batches, evaluations = 3 * 3 * 96 / 16 * 0.05, 3 * 3 * 0.1
    for label, work in (("sequential_merge", batches), ("joint", batches), ("zero_shot", 0.0)):
        assert found[label].work == pytest.approx(work + evaluations, rel=0.3)
        assert found[label].scoring == pytest.approx(3 * 0.1, rel=0.3)
        assert found[label].start > 0.5  # a process imports torch


def test_the_time_left_counts_processes_and_finished_tasks(config: Write, straight: Path) -> None:
    cells = [Cell("a", "default", seed) for seed in range(4)]
    costs = [Estimate("a", 69.0, "measured", start=6.0, scoring=3.0)]
    for slots, seconds in ((1, 4 * 69), (2, 2 * 69), (3, 2 * 69), (4, 69), (9, 69)):
        assert time_left(cells, {}, costs, slots) == seconds
    record = RunRecord.load(straight / "cells" / "ours-seed0")
    record.truncate(1)
    assert costs[0].seconds_left(record) == pytest.approx(6 + 60 * 2 / 3)  # the first evaluation is done too
    assert time_left(cells[:2], {cells[0]: record}, costs, 2) == 69
    assert time_left(cells[:2], {cells[0]: record}, costs, 1) == pytest.approx(46 + 69)
    assert time_left([], {}, [], 2) == 0


@pytest.mark.long
@pytest.mark.stream
def test_three_kills_at_random_moments_change_no_number(tmp_path: Path) -> None:
    """On real texts and the real model, through the command, a process group killed outright each time."""
    path = tmp_path / "study.toml"
    path.write_text(
        'stream = "text-three"\nexamples = 160\nrank = 8\nseeds = [0]\nprocesses = 2\n'
        "[methods.sequential_merge]\n[methods.eblora]\n"
    )

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "manifold_cl.cli", "study", str(path), "--out", str(out)]

    subprocess.run(command(tmp_path / "straight"), check=True, timeout=900)
    expected = numbers(tmp_path / "straight")
    moments = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command(tmp_path / "killed"), start_new_session=True)
        time.sleep(moments.uniform(12, 25))  # importing, reading and loading take the first ten seconds
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, timeout=900)
    assert numbers(tmp_path / "killed") == expected
    assert [status for status, *_ in expected.values()] == ["complete"] * 2
