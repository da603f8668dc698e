import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import Record
from analysis.formats import label_records


@pytest.fixture
def write(tmp_path: Path, record: dict[str, Any]) -> Callable[..., Path]:
    def write(*, without: str | None = None, **changes: Any) -> Path:
        data = {key: value for key, value in (record | changes).items() if key != without}
        (tmp_path / "record.json").write_text(json.dumps(data))
        return tmp_path

    return write


def test_a_record_is_read_with_nan_for_null(write: Callable[..., Path]) -> None:
    run = Record.load(write())
    assert (run.name, run.method, run.stream, run.status) == ("eblora-0", "eblora", "toy", "complete")
    assert run.tasks == ("news", "nouns", "films")
    np.testing.assert_array_equal(run.matrix[1], [65.0, 80.0, np.nan])
    np.testing.assert_array_equal(run.baseline, [50.0, 40.0, 30.0])
    np.testing.assert_array_equal(run.losses[0], [1.0, np.nan])
    assert run.metrics["bwt"] == -7.5
    assert run.learning_time == 3 * (1.0 + 2.0 + 0.5)  # evaluation and the optimizer's share are not added
    assert run.config["optimizer"] == {"lr": 0.001}
    assert run.finished is None


def test_what_is_stored_is_read_and_unknown_in_older_records(write: Callable[..., Path]) -> None:
    assert Record.load(write()).stored is None
    run = Record.load(write(stored={"updates": 2654208, "state": None, "old_examples": 0}))
    assert run.stored is not None
    assert (run.stored["updates"], run.stored["old_examples"]) == (2654208.0, 0.0)
    assert np.isnan(run.stored["state"])


def test_the_file_may_be_named_directly(write: Callable[..., Path]) -> None:
    assert Record.load(write() / "record.json").folder == Record.load(write()).folder


def test_a_running_record_has_unknown_numbers(write: Callable[..., Path]) -> None:
    run = Record.load(write(status="running", metrics={"mft": None}, timings=[], zero_shot={}, peak_memory_mb=None))
    assert np.isnan([run.metrics["mft"], run.learning_time, run.peak_memory_mb]).all()
    assert np.isnan(run.baseline).all()


def test_a_phase_that_a_task_lacks_takes_no_time(write: Callable[..., Path]) -> None:
    rests = [{"prepare": 1.0, "train": 2.0, "finish": 0.5, "evaluate": 9.0}, {"evaluate": 9.0}, {"evaluate": 9.0}]
    assert Record.load(write(method="joint", timings=rests)).learning_time == 3.5
    assert Record.load(write(method="zero_shot", timings=rests[1:])).learning_time == 0.0
    lost = [{"prepare": 1.0, "train": None, "finish": 0.5}]
    assert np.isnan(Record.load(write(timings=lost)).learning_time)  # there, and unknown
    assert Record.load(write(timings=rests)).seconds("evaluate") == 27.0


def test_joint_training_has_no_forward_transfer(write: Callable[..., Path]) -> None:
    figures = {"mft": 80.0, "fwt": 36.1, "fwt_flat": 1.0}
    assert set(Record.load(write(method="joint", metrics=figures)).merits) == {"mft"}
    assert Record.load(write(metrics=figures)).merits == figures


def test_broken_records_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"record\.json does not exist"):
        Record.load(tmp_path / "record.json")
    for changes, message in (
        ({"format": "mteb"}, r"record\.json: format is 'mteb', 'manifold_cl\.record' was expected"),
        ({"version": 7}, "version 7 of manifold_cl"),
        ({"version": True}, "version True of manifold_cl"),
        ({"version": 1.0}, "version 1.0 of manifold_cl"),
        ({"accuracy": {"accuracy": [[True] * 3] * 3}}, "True is no number"),
        ({"accuracy": {"accuracy": [["80"] * 3] * 3}}, "'80' is no number"),
        ({"losses": [[1.0, False]]}, "False is no number"),
        ({"without": "tasks"}, "'tasks' is missing, a list was expected"),
        ({"primary": "f1"}, r"primary score 'f1' is not among \['accuracy'\]"),
        ({"accuracy": {"accuracy": [[1.0]]}}, r"accuracy 'accuracy' has shape \(1, 1\), 3 tasks need \(3, 3\)"),
        ({"zero_shot": {"accuracy": [1.0]}}, r"zero_shot 'accuracy' has shape \(1,\), expected \(3,\)"),
        ({"accuracy": {"accuracy": [[1.0], [1.0, 2.0]]}}, r"does not follow docs/record-format\.md"),
        ({"metrics": [1, 2]}, r"'metrics' is \[1, 2\], an object or null"),
        ({"metrics": {"mft": "80"}}, r"does not follow docs/record-format\.md: '80' is no number"),
        ({"metrics": {"mft": True}}, "True is no number"),
        ({"metrics": {"mft": 10**400}}, "int too large to convert to float"),
        ({"accuracy": {"accuracy": [[10**400] * 3] * 3}}, r"does not follow docs/record-format\.md"),
        ({"versions": ["2.13"]}, r"'versions' is \['2.13'\], an object or null"),
        ({"method": ["eblora"]}, r"'method' is \['eblora'\], text was expected"),
        ({"tasks": ["a", "b", 3]}, r"key 'tasks' is \['a', 'b', 3\], different names"),
        ({"tasks": ["a", "b", "a"]}, r"key 'tasks' is \['a', 'b', 'a'\], different names"),
        ({"accuracy": None}, "'accuracy' is None, an object was expected"),
        ({"zero_shot": [1.0]}, r"'zero_shot' is \[1\.0\], an object was expected"),
        ({"tasks": "abc"}, "'tasks' is 'abc', a list was expected"),
        ({"accuracy": {"accuracy": None}}, r"accuracy 'accuracy' has shape \(\), 3 tasks need"),
        ({"stored": 5}, "'stored' is 5, an object or null"),
    ):
        with pytest.raises(ValueError, match=message):
            Record.load(write(**changes))
    (tmp_path / "record.json").write_text('{"format": "manifold_cl.record", "vers')
    with pytest.raises(ValueError, match=r"record\.json is truncated or not JSON"):
        Record.load(tmp_path)
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(ValueError, match=r"record\.json holds a list, not an object"):
        Record.load(tmp_path)


def test_runs_are_labelled_by_what_tells_them_apart(write: Callable[..., Path]) -> None:
    first, other = Record.load(write()), Record.load(write(method="lora", name="lora-0"))
    again = Record.load(write(name="eblora-1"))
    assert list(label_records(first)) == ["eblora"]
    assert list(label_records([first, other])) == ["eblora", "lora"]
    assert list(label_records([first, again])) == ["eblora-0", "eblora-1"]
    with pytest.raises(ValueError, match="runs share their names"):
        label_records([first, first])
