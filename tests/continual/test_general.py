"""Tasks that are only evaluated: what learning does to abilities outside the stream."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from records import editable
from toy import toy_stream

from manifold_cl.continual import ContinualRunner, RunRecord, TaskStream
from manifold_cl.continual.metrics import general_delta
from manifold_cl.files import FileError


@pytest.fixture
def stream() -> TaskStream:
    """Two tasks, and the third one only evaluated."""
    complete = toy_stream()
    return replace(complete, tasks=complete.tasks[:2], general=complete.tasks[2:])


def test_general_tasks_are_evaluated_before_and_after_each_task_and_never_trained(
    stream: TaskStream, runner: Callable[..., ContinualRunner], tmp_path: Path
) -> None:
    record = runner(tmp_path / "with", stream=stream, epochs=1).run()
    (row,) = record.general.values()
    assert (list(record.general), len(row)) == (["third"], 3)
    complete = toy_stream()
    alone = runner(tmp_path / "alone", stream=replace(complete, tasks=complete.tasks[2:]), method="zero_shot").run()
    assert row[0] == alone.zero_shot[alone.primary][0]
    without = runner(tmp_path / "without", stream=replace(stream, general=()), epochs=1).run()
    assert without.losses == record.losses
    assert without.accuracy == record.accuracy
    assert record.metrics["general_delta"] == row[2] - row[0] != 0
    assert "general_delta" not in without.metrics
    assert RunRecord.load(tmp_path / "with").general == record.general
    assert record.config["general"] == ["third"]


def test_an_interrupted_run_goes_on_with_the_same_general_scores(
    stream: TaskStream, runner: Callable[..., ContinualRunner], tmp_path: Path
) -> None:
    complete = runner(tmp_path / "a", stream=stream, epochs=1).run()

    def stop(progress) -> None:  # type: ignore[no-untyped-def]
        if progress.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path / "b", stream=stream, epochs=1, on_progress=stop).run()
    stopped = RunRecord.load(tmp_path / "b")
    assert stopped.general == {"third": complete.general["third"][:2]}
    assert str(stopped.metrics["general_delta"]) == "nan"
    assert runner(tmp_path / "b", stream=stream, epochs=1).run(resume=True).general == complete.general
    complete.truncate(1)
    assert complete.general == stopped.general


def test_a_general_task_has_a_name_of_its_own_and_a_record_all_its_scores(
    stream: TaskStream, runner: Callable[..., ContinualRunner], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="task names must differ, got first, second, first"):
        replace(stream, general=stream.tasks[:1])
    runner(tmp_path, stream=stream, epochs=1).run()
    content = editable(tmp_path / "record.json")
    content["general"]["third"].pop()
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match="general of third has other than 3 scores"):
        RunRecord.load(tmp_path)


def test_the_delta_is_known_when_all_tasks_are_learned() -> None:
    assert general_delta({"a": [10.0, 12.0, 9.0], "b": [50.0, 50.0, 53.0]}, 2) == 1.0
    assert str(general_delta({"a": [10.0, 12.0]}, 2)) == "nan"
