"""One run per folder at a time, in one place, and no temporary files after a killed run."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from records import editable

from manifold_cl import ContinualRunner, RunRecord
from manifold_cl.continual.run_folder import RunFolder
from manifold_cl.continual.runner import Progress
from manifold_cl.files import FileError

Make = Callable[..., ContinualRunner]


def folder_of(path: Path) -> RunFolder:
    return RunFolder(path, ("first", "second", "third"))


def at_step(index: int, call: Callable[[], object]) -> Callable[[Progress], None]:
    """Calls ``call`` once, at the first training step of a task."""
    called = []

    def on_progress(state: Progress) -> None:
        if (state.index, state.phase, state.step) == (index, "train", 1) and not called:
            called.append(call())

    return on_progress


def test_a_second_run_with_other_options_is_refused_before_there_is_a_record(runner: Make, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(state: Progress) -> None:
        if state.phase == "zero-shot" and not refused:
            for call in ("validate", "run"):
                with pytest.raises(FileError, match=r"another process is at work on .*run: wait for it, or stop it"):
                    getattr(runner(tmp_path / "run", "sequential_merge", lr=0.01, epochs=1), call)()
                refused.append(call)

    record = runner(tmp_path / "run", "sequential_merge", epochs=1, on_progress=second).run()
    assert refused == ["validate", "run"]
    assert record.config["lr"] == 0.03


def test_a_second_process_that_resumes_is_refused(runner: Make, tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        for call in ("validate", "run"):
            with pytest.raises(
                FileError, match=r"another process is at work on .*run: wait for it, or stop it"
            ) as found:
                getattr(runner(tmp_path / "run", "sequential_merge", epochs=1), call)(resume=True)
            refused.append(str(found.value))

    record = runner(tmp_path / "run", "sequential_merge", epochs=1, on_progress=at_step(1, second)).run()
    assert len(refused) == 2
    assert record.status == "complete"
    assert runner(tmp_path / "run", "sequential_merge", epochs=1).run(resume=True) == record  # the lock is gone


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with folder_of(tmp_path).locked():
            os.write(tell, b"x")
            time.sleep(600)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    with pytest.raises(FileError, match="another process is at work"), folder_of(tmp_path).locked():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run.lock").exists()
    with folder_of(tmp_path).locked():
        pass


def test_what_killed_writes_left_is_deleted(tmp_path: Path) -> None:
    task = tmp_path / "tasks" / "01-first"
    task.mkdir(parents=True)
    left = [tmp_path / ".record.json.17.tmp", task / ".learned.json.17.tmp"]
    kept = [tmp_path / ".notes.tmp", tmp_path / "record.json.tmp", task / "adapter.json"]
    for path in (*left, *kept):
        path.write_text("{}")
    with folder_of(tmp_path).locked():
        pass
    assert [path.exists() for path in (*left, *kept)] == [False] * 2 + [True] * 3


@pytest.mark.parametrize("resumes", [False, True])
def test_a_folder_that_is_moved_during_a_run_is_not_made_again(resumes: bool, runner: Make, tmp_path: Path) -> None:
    old, new = tmp_path / "run", tmp_path / "elsewhere"
    moving = runner(old, "sequential_merge", epochs=1, on_progress=at_step(1, lambda: old.rename(new)))
    with pytest.raises(FileError, match=r"run\.lock is not the file that this run locked: the folder was moved"):
        moving.run()
    assert not old.exists()
    if resumes:
        record = runner(new, "sequential_merge", epochs=1).run(resume=True)
        assert (record.status, len(record.losses)) == ("complete", 3)


def test_files_of_another_run_are_not_taken_for_those_of_the_record(
    runner: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, "sequential_merge", epochs=1, on_progress=at_step(2, stop)).run()
    path = folder / "tasks" / "01-first" / "learned.json"
    noted = editable(path)
    path.write_text(json.dumps({**noted, "run": "2020-01-01T00:00:00+00:00"}))
    record = runner(folder, "sequential_merge", epochs=1).run(resume=True)
    assert "is of another run (2020-01-01T00:00:00+00:00)" in caplog.text
    assert "going back to task 0" in caplog.text
    assert record.losses[0] == noted["losses"]


@pytest.mark.parametrize(
    "change",
    [
        {"losses": "none"},
        {"losses": [["1"]]},
        {"constraints": []},
        {"timings": {"train": "1"}},
        {"run": 7},
        {"files": "adapter.safetensors"},
        {"files": ["../01-first/adapter.safetensors"]},
        {"files": [None]},
    ],
)
def test_notes_of_other_kinds_are_not_followed(
    change: dict[str, object], runner: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(state: Progress) -> None:
        if (state.index, state.phase) == (1, "evaluate"):
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, "sequential_merge", epochs=1, on_progress=stop).run()
    path = folder / "tasks" / "02-second" / "learned.json"
    noted = editable(path)
    path.write_text(json.dumps({**noted, **change}))
    record = runner(folder, "sequential_merge", epochs=1).run(resume=True)
    assert "learning the task again" in caplog.text
    assert record.losses[1] == noted["losses"]


def test_an_older_record_with_names_of_other_tasks_is_refused(runner: Make, tmp_path: Path) -> None:
    runner(tmp_path / "run", "sequential_merge", epochs=1).run()
    path = tmp_path / "run" / "record.json"
    record = editable(path)
    path.write_text(json.dumps({**record, "tasks": ["third", "second", "first"]}))
    with pytest.raises(FileError, match="holds a run of other tasks: third, second, first"):
        runner(tmp_path / "run", "sequential_merge", epochs=1).run(resume=True)


def test_a_run_that_is_complete_needs_no_lock(runner: Make, tmp_path: Path) -> None:
    record = runner(tmp_path / "run", "sequential_merge", epochs=1).run()
    (tmp_path / "run" / "run.lock").unlink()
    assert runner(tmp_path / "run", "sequential_merge", epochs=1).run(resume=True) == record
    assert not (tmp_path / "run" / "run.lock").exists()
    assert RunRecord.load(tmp_path / "run") == record


def test_a_run_that_started_in_the_same_second_is_another_run(
    runner: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(state: Progress) -> None:
        if state.phase == "evaluate":
            raise KeyboardInterrupt

    monkeypatch.setattr("manifold_cl.continual.runner.utc_now", lambda: "2026-01-01T00:00:00+00:00")
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, "sequential_merge", epochs=1, lr=0.01, on_progress=stop).run()
    noted = json.loads((folder / "tasks" / "01-first" / "learned.json").read_text())
    (folder / "record.json").unlink()
    record = runner(folder, "sequential_merge", epochs=1).run()
    assert record.started == "2026-01-01T00:00:00+00:00"
    assert record.losses[0] != noted["losses"]
    assert RunRecord.load(folder).identity == record.run


def test_a_record_of_an_older_version_is_known_by_its_start(runner: Make, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short / "sequential_merge", folder)
    record = editable(folder / "record.json")
    record |= {"status": "running"}
    del record["run"]
    (folder / "record.json").write_text(json.dumps(record))
    for path in folder.glob("tasks/*/learned.json"):
        path.write_text(json.dumps({**editable(path), "run": record["started"]}))
    steps: list[int] = []
    resumed = runner(folder, "sequential_merge", epochs=1, on_progress=lambda state: steps.append(state.step))
    assert resumed.run(resume=True).losses == record["losses"]
    assert steps == []
