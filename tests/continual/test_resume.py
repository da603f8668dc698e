"""A run that is killed at any moment resumes to the same numbers, bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import killed_at
from records import EXACT
from toy import toy_stream

from manifold_cl import ContinualRunner, RunRecord
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.additional_parameters import AdditionalParameters
from manifold_cl.continual.runner import Progress

Make = Callable[..., ContinualRunner]
VERSION_1 = Path(__file__).parents[1] / "version_1"


class KilledError(Exception):
    """Stands for a process that ends."""


def killer(index: int, phase: str, step: int = 0) -> Callable[[Progress], None]:
    def on_progress(state: Progress) -> None:
        if (state.index, state.phase, state.step) == (index, phase, step):
            raise KilledError

    return on_progress


def assert_same_run(found: Path, expected: Path) -> None:
    ours, theirs = RunRecord.load(found), RunRecord.load(expected)
    for field in EXACT:
        assert getattr(ours, field) == getattr(theirs, field), field
    tensors = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert sorted(path.relative_to(found) for path in found.rglob("*.safetensors")) == tensors
    assert tensors
    for path in tensors:
        assert (found / path).read_bytes() == (expected / path).read_bytes(), path


@pytest.mark.parametrize(
    ("method", "moment", "done"),
    [
        ("eblora", (0, "zero-shot", 1), None),
        ("eblora", (0, "prepare"), 0),
        ("eblora", (0, "evaluate", 1), 0),  # after the memory of the first task was written
        ("eblora", (1, "prepare"), 1),
        ("eblora", (1, "train", 5), 1),
        ("eblora", (1, "finish"), 1),
        ("eblora", (1, "evaluate", 2), 1),
        ("eblora", (2, "prepare"), 2),
        ("eblora", (2, "train", 6), 2),
        ("sequential_merge", (1, "prepare"), 1),
        ("sequential_merge", (2, "train", 3), 2),
        ("sequential_merge", (2, "evaluate", 0), 2),
    ],
)
def test_a_killed_run_goes_on_to_the_same_numbers(
    method: str, moment: tuple[int, str], done: int | None, runner: Make, short: Path, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        runner(tmp_path / method, method, epochs=1, on_progress=killer(*moment)).run()
    assert (tmp_path / method / "record.json").exists() == (done is not None)
    if done is not None:
        left = RunRecord.load(tmp_path / method)
        assert (left.done, left.status) == (done, "running")
    record = runner(tmp_path / method, method, epochs=1).run(resume=True)
    assert record.status == "complete"
    assert_same_run(tmp_path / method, short / method)


def test_a_run_killed_after_every_task_goes_on_each_time(runner: Make, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "eblora"
    for index in range(3):
        with pytest.raises(KilledError):
            runner(folder, epochs=1, on_progress=killer(index, "finish")).run(resume=True)
        assert RunRecord.load(folder).done == index
        if index < 2:
            with pytest.raises(KilledError):
                runner(folder, epochs=1, on_progress=killer(index + 1, "prepare")).run(resume=True)
    runner(folder, epochs=1).run(resume=True)
    assert_same_run(folder, short / "eblora")


def test_the_same_runner_may_go_on_after_an_interruption(runner: Make, short: Path, tmp_path: Path) -> None:
    """The method's state of the unfinished task is forgotten, not carried into the second attempt."""
    interrupted = runner(tmp_path / "eblora", epochs=1, on_progress=killer(0, "evaluate", 0))
    with pytest.raises(KilledError):
        interrupted.run()
    interrupted.on_progress = None
    interrupted.run(resume=True)
    assert_same_run(tmp_path / "eblora", short / "eblora")


@pytest.mark.parametrize("number", [2, 3, 4, 6, 7])
def test_a_run_killed_at_a_rename_goes_on_to_the_same_files(
    number: int, runner: Make, short: Path, tmp_path: Path
) -> None:
    """Two are of the first task's adapters and memory, 4 of its ``learned.json``; the record's are between them."""
    folder = tmp_path / "eblora"
    assert killed_at(number, lambda: runner(folder, epochs=1).run() and None)
    runner(folder, epochs=1).run(resume=True)
    assert_same_run(folder, short / "eblora")
    assert not list(folder.rglob(".*"))


def test_a_folder_without_a_record_is_a_fresh_start(runner: Make, short: Path, tmp_path: Path) -> None:
    (tmp_path / "eblora" / "tasks" / "01-first").mkdir(parents=True)
    (tmp_path / "eblora" / "tasks" / "01-first" / "adapter.safetensors").write_bytes(b"left over")
    runner(tmp_path / "eblora", epochs=1).run(resume=True)
    assert_same_run(tmp_path / "eblora", short / "eblora")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("tasks/01-first/adapter.safetensors", 0),
        ("tasks/02-second/learned.json", 1),
        ("tasks/02-second/memory.safetensors", 1),
    ],
)
def test_a_run_goes_back_to_before_a_damaged_file(
    name: str, task: int, runner: Make, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "eblora"
    with pytest.raises(KilledError):
        runner(folder, epochs=1, on_progress=killer(2, "prepare")).run()
    path = folder / name
    path.write_bytes(path.read_bytes()[:-7])
    runner(folder, epochs=1).run(resume=True)
    assert f"going back to task {task}, the last intact one" in caplog.text
    assert_same_run(folder, short / "eblora")


@pytest.mark.parametrize(
    ("method", "lost", "task", "said"),
    [
        ("eblora", ["tasks/01-first"], 0, "01-first/learned.json does not exist"),
        ("eblora", ["tasks/02-second/memory.safetensors"], 1, "memory.safetensors does not exist"),
        ("sequential_merge", ["tasks/01-first/adapter.safetensors"], 0, "01-first/adapter.safetensors does not exist"),
        ("sequential_merge", ["tasks"], 0, "01-first/learned.json does not exist"),
    ],
)
def test_a_run_goes_back_to_before_a_file_that_is_gone(
    method: str,
    lost: list[str],
    task: int,
    said: str,
    runner: Make,
    short: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / method
    with pytest.raises(KilledError):
        runner(folder, method, epochs=1, on_progress=killer(2, "prepare")).run()
    for name in lost:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    runner(folder, method, epochs=1).run(resume=True)
    assert f"{said}; going back to task {task}, the last intact one" in caplog.text
    assert_same_run(folder, short / method)


@pytest.mark.parametrize("name", ["adapter.safetensors", "memory.safetensors", "learned.json"])
def test_intact_files_of_another_task_are_not_taken(
    name: str, runner: Make, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "eblora"
    with pytest.raises(KilledError):
        runner(folder, epochs=1, on_progress=killer(2, "prepare")).run()
    one, other = (folder / "tasks" / task / name for task in ("01-first", "02-second"))
    one.rename(tmp_path / name)
    other.rename(one)
    (tmp_path / name).rename(other)
    runner(folder, epochs=1).run(resume=True)
    assert f"01-first/{name} is of " in caplog.text
    assert "going back to task 0, the last intact one" in caplog.text
    assert_same_run(folder, short / "eblora")


def test_a_task_that_was_learned_is_learned_again_where_its_files_are_gone(
    runner: Make, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "eblora"
    with pytest.raises(KilledError):
        runner(folder, epochs=1, on_progress=killer(1, "evaluate", 0)).run()
    (folder / "tasks" / "02-second" / "adapter.safetensors").unlink()
    runner(folder, epochs=1).run(resume=True)
    assert "02-second/adapter.safetensors does not exist; learning the task again" in caplog.text
    assert_same_run(folder, short / "eblora")


def test_a_run_of_version_1_goes_on(runner: Make, short: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(VERSION_1 / "eblora", tmp_path / "eblora")
    before = json.loads((folder / "record.json").read_text())
    record = runner(folder, epochs=1).run(resume=True)
    assert record.status == "complete"
    assert record.losses[:2] == before["losses"]
    last = sorted(path.name for path in (folder / "tasks" / "03-third").iterdir())
    assert last == ["adapter.safetensors", "learned.json", "memory.safetensors"]
    # Another machine wrote it, whose numbers differ by roundings.
    expected = RunRecord.load(short / "eblora").losses[2]
    assert record.losses[2] == pytest.approx(expected, rel=1e-3)


def test_weights_and_companions_of_version_1_go_on(tmp_path: Path) -> None:
    folder = shutil.copytree(VERSION_1 / "gpm", tmp_path / "gpm")
    before = json.loads((folder / "record.json").read_text())
    stream = dataclasses.replace(toy_stream(), additional_parameters=AdditionalParameters(r"head\.weight", lr=0.01))
    record = ContinualRunner(stream, make_method("gpm"), folder, training=Training(epochs=1)).run(resume=True)
    assert (record.status, record.losses[:1]) == ("complete", before["losses"])


@pytest.mark.parametrize("name", ["adapter.safetensors", "memory.json", "learned.json"])
def test_a_damaged_run_of_version_1_goes_back(name: str, runner: Make, tmp_path: Path, caplog) -> None:
    folder = shutil.copytree(VERSION_1 / "eblora", tmp_path / "eblora")
    path = folder / "tasks" / "02-second" / name
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    assert runner(folder, epochs=1).run(resume=True).status == "complete"
    assert "going back to task 1, the last intact one" in caplog.text


def test_what_is_complete_needs_nothing_but_its_record(runner: Make, short: Path, tmp_path: Path) -> None:
    (tmp_path / "eblora").mkdir()
    shutil.copy(short / "eblora" / "record.json", tmp_path / "eblora")
    assert runner(tmp_path / "eblora", epochs=1).run(resume=True) == RunRecord.load(short / "eblora")
