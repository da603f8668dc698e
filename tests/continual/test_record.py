"""record.json: the keys of docs/record-format.md, and a round trip."""

import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import editable

import manifold_cl
from manifold_cl import RunRecord
from manifold_cl.continual.environment import library_versions
from manifold_cl.continual.record import config_differences
from manifold_cl.files import FileError
from manifold_cl.tensor_files import read_tensors

DOCUMENT = (Path(manifold_cl.__file__).parents[1] / "docs" / "record-format.md").read_text(encoding="utf-8")
NAMES = ("eblora", "sequential_merge", "zero_shot")


def raw(finished: Path, name: str) -> dict[str, Any]:
    return editable(finished / name / "record.json")


def documented_keys() -> set[str]:
    table = DOCUMENT.split("## `record.json`")[1].split("##")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", table, flags=re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("name", NAMES)
def test_the_record_has_the_documented_keys_and_no_others(name: str, finished: Path) -> None:
    assert len(documented_keys()) == 25
    assert set(raw(finished, name)) == documented_keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_of_the_documented_kinds(name: str, finished: Path) -> None:
    record = raw(finished, name)
    assert (record["format"], record["version"]) == ("manifold_cl.record", 1)
    assert (record["name"], record["method"], record["stream"]) == (name, name, "toy")
    assert record["status"] == "complete"
    assert record["tasks"] == ["first", "second", "third"]
    assert set(record["zero_shot"]) == set(record["accuracy"]) == {"accuracy", "certainty"}
    assert record["primary"] == "accuracy"
    assert all(len(scores) == 3 for scores in record["zero_shot"].values())
    for matrix in record["accuracy"].values():
        assert np.shape(matrix) == (3, 3)
        assert all(0 <= value <= 100 for row in matrix for value in row)
    figures = {"mft", "mfn", "maa", "bwt", "bwt_over_all", "fwt", "fwt_flat", "forgetting", "forgetting_just_learned"}
    assert set(record["metrics"]) == figures | {"zero_shot"}
    for key in ("timings", "losses", "constraints", "capacity"):
        assert len(record[key]) == 3
    assert record["peak_memory_mb"] > 50  # an interpreter with torch
    assert set(record["stored"]) == {"updates", "state", "old_examples"}
    assert record["stored"]["old_examples"] == 0
    assert {"python", "torch", "geoopt", "numpy", "safetensors"} <= set(record["versions"])
    assert record["machine"]["threads"] >= 1
    assert record["provenance"] == {"origin": "drawn from seeds"}
    started, ended = (datetime.fromisoformat(record[key]) for key in ("started", "finished"))
    assert started <= ended
    assert started.utcoffset() is not None


def test_timings_are_seconds_and_a_share(finished: Path) -> None:
    for timing in raw(finished, "eblora")["timings"]:
        assert set(timing) == {"prepare", "train", "optimizer", "finish", "evaluate", "steps"}
        assert 0 < timing["optimizer"] < 1
        assert all(0 < timing[phase] < 60 for phase in ("prepare", "train", "finish", "evaluate"))
        assert timing["steps"] == 24
    assert [set(timing) for timing in raw(finished, "zero_shot")["timings"]] == [{"evaluate", "steps"}] * 3


def test_the_folder_holds_the_documented_files(finished: Path) -> None:
    found = sorted(str(p.relative_to(finished / "eblora")) for p in (finished / "eblora").rglob("*") if p.is_file())
    tasks = ("01-first", "02-second", "03-third")
    files = ("adapter.safetensors", "learned.json", "memory.safetensors")
    assert found == ["record.json", "run.lock", *(f"tasks/{task}/{file}" for task in tasks for file in files)]
    assert sorted(p.name for p in (finished / "zero_shot").iterdir()) == ["record.json", "run.lock"]
    plain = {p.name for p in (finished / "sequential_merge").rglob("*") if p.is_file()}
    assert plain == {"record.json", "run.lock", "adapter.safetensors", "learned.json"}


def test_adapters_and_memory_are_the_documented_tensors(finished: Path) -> None:
    folder = finished / "eblora" / "tasks" / "02-second"
    tensors, manifest = read_tensors(folder / "adapter.safetensors")
    assert set(tensors) == {f"{layer}.{key}" for layer in ("inner", "outer") for key in ("left", "right", "scale")}
    assert {manifest[key] for key in ("kind", "task")} == {"eblora", "second"}
    bases, remembered = read_tensors(folder / "memory.safetensors")
    assert {"inner.basis", "outer.basis"} <= set(bases)
    assert (remembered["task"], remembered["energy"], remembered["source"]) == ("second", 0.9, "sensitivity")
    # The update of a task avoids what the task before protected.
    before, _ = read_tensors(finished / "eblora" / "tasks" / "01-first" / "memory.safetensors")
    for layer in ("inner", "outer"):
        assert before[f"{layer}.basis"].shape[1] > 0
        leak = before[f"{layer}.basis"].double().T @ tensors[f"{layer}.right"].double()
        assert float(leak.abs().max()) <= 2e-6  # the documented bound


@pytest.mark.parametrize("name", NAMES)
def test_a_record_comes_back_as_it_went(name: str, finished: Path, tmp_path: Path) -> None:
    record = RunRecord.load(finished / name)
    record.save(tmp_path)
    assert (tmp_path / "record.json").read_bytes() == (finished / name / "record.json").read_bytes()
    assert RunRecord.load(tmp_path) == record


def test_a_record_in_the_middle_has_nulls_where_nothing_is_known(tmp_path: Path) -> None:
    record = RunRecord(
        "run", "m", "s", config={"limit": None}, tasks=["a", "b"], primary="p", zero_shot={"p": [1.0, 2]}
    )
    record.save(tmp_path)
    assert RunRecord.load(tmp_path).done == 0
    record.add_row([{"p": 50.0, "q": 1.0}, {"p": 30.0, "q": float("nan")}])
    record.losses.append([0.5, math.inf])
    for rows in (record.timings, record.constraints, record.capacity):
        rows.append({})
    record.save(tmp_path)
    text = (tmp_path / "record.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    content = json.loads(text)
    assert content["accuracy"] == {"p": [[50.0, 30.0], [None, None]], "q": [[1.0, None], [None, None]]}
    assert (content["metrics"]["mfn"], content["metrics"]["fwt"]) == (None, 30.0)
    assert content["metrics"]["zero_shot"] == 1.5
    loaded = RunRecord.load(tmp_path)
    assert loaded.done == 1
    assert loaded.config == {"limit": None}  # an option that is off is not an unknown number
    assert math.isnan(loaded.metrics["mfn"])
    np.testing.assert_array_equal(loaded.matrix("q"), [[1.0, np.nan], [np.nan, np.nan]])
    loaded.add_row([{"p": 40.0, "q": 1.0}, {"p": 70.0, "q": 2.0}])
    assert loaded.matrix().tolist() == [[50.0, 30.0], [40.0, 70.0]]
    assert loaded.metrics["bwt"] == -10.0


def test_seconds_are_those_of_the_phases_and_count_nothing_twice() -> None:
    learned = {"prepare": 1.0, "train": 2.0, "optimizer": 0.5, "finish": 3.0, "evaluate": 4.0, "steps": 7}
    record = RunRecord("a", "b", "c", {}, ["d", "e"], timings=[learned, {"evaluate": 0.25, "steps": 0}])
    assert record.seconds == 10.25


def test_a_process_that_goes_on_keeps_the_larger_peak_of_memory() -> None:
    record = RunRecord("a", "b", "c", {}, ["d"], primary="p", zero_shot={"p": [1.0]}, peak_memory_mb=1e9)
    record.add_row([{"p": 2.0}])
    assert record.peak_memory_mb == 1e9
    record.peak_memory_mb = 0.0
    record.truncate(0)
    assert 50 < record.peak_memory_mb < 1e9  # an interpreter with torch


def test_files_that_are_no_records_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"record\.json does not exist"):
        RunRecord.load(tmp_path)
    path = tmp_path / "record.json"
    path.write_text('{"format": "manifold_cl.record", "version": 1, "name": "x", "tasks": []}')
    with pytest.raises(FileError, match=r"record\.json lacks config, method, stream: it was not written by a run"):
        RunRecord.load(tmp_path)
    known = {"name": "x", "method": "m", "stream": "s", "config": {}, "tasks": [], "accuracy": None}
    path.write_text(json.dumps({"format": "manifold_cl.record", "version": 1, **known}))
    with pytest.raises(FileError, match=r"record\.json does not follow its format \(accuracy is 'None', an object"):
        RunRecord.load(tmp_path)
    path.write_text('{"format": "manifold_cl.adapter", "version": 1}')
    with pytest.raises(FileError, match=r"record\.json is not of format 'manifold_cl\.record'"):
        RunRecord.load(tmp_path)
    path.write_text("")
    with pytest.raises(FileError, match=r"record\.json is damaged or truncated"):
        RunRecord.load(tmp_path)


WRONG: list[tuple[str, object, str]] = [
    ("tasks", "abc", "tasks is 'abc', a list is needed"),
    ("tasks", ["a", 2, "c"], "tasks are names"),
    ("tasks", ["first", "second"], r"zero_shot of accuracy has 3 scores for 2 tasks"),
    ("status", "done", "status is running or complete, got 'done'"),
    ("name", 7, "name is '7', a word is needed"),
    ("config", [], "config is .*, an object is needed"),
    ("primary", "loss", "the primary score 'loss' is not among accuracy, certainty"),
    ("zero_shot", {"accuracy": ["1", 2, 3]}, "zero_shot of accuracy is a list of numbers"),
    ("accuracy", {"accuracy": [[1, 2, 3]]}, "accuracy of accuracy is not a list of 3 rows"),
    ("accuracy", {"accuracy": [[1, 2]] * 3}, "accuracy of accuracy has a row of 2 scores for 3 tasks"),
    ("accuracy", {"accuracy": [[1, 2, True]] * 3}, "accuracy of accuracy is a list of numbers"),
    ("accuracy", {"accuracy": [[1, 2, 10**400]] * 3}, "int too large"),
    ("losses", [[1.0]], "tables are of different numbers of tasks"),
    ("losses", [[1.0], [1.0], [1.0]], "a task of 24 steps has 1 losses"),
    ("losses", [1.0, 2.0, 3.0], "losses is a list of numbers"),
    ("timings", [{}, {}, {}, {}], "tables are of different numbers of tasks"),
    ("timings", [{"train": "2"}, {}, {}], "timings is an object of numbers"),
    ("constraints", [[], [], []], "constraints is an object of numbers"),
    ("metrics", {"mfn": "high"}, "metrics is an object of numbers"),
    ("peak_memory_mb", "much", "peak_memory_mb is a list of numbers"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_record_whose_fields_are_of_other_kinds_is_refused_by_name(
    key: str, value: object, message: str, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "record.json").write_text(json.dumps({**raw(finished, "eblora"), key: value}))
    with pytest.raises(FileError, match=rf"record\.json does not follow its format \(.*{message}"):
        RunRecord.load(tmp_path)


def test_a_record_without_the_tables_of_older_versions_is_read(finished: Path, tmp_path: Path) -> None:
    older = {key: value for key, value in raw(finished, "eblora").items() if key not in ("capacity", "stored")}
    (tmp_path / "record.json").write_text(json.dumps(older))
    assert RunRecord.load(tmp_path).matrix().tolist() == RunRecord.load(finished / "eblora").matrix().tolist()


def test_scores_that_are_all_unknown_are_a_row_of_a_task_that_was_learned(finished: Path, tmp_path: Path) -> None:
    record = raw(finished, "eblora")
    for rows in record["accuracy"].values():
        rows[1] = [None] * 3
    (tmp_path / "record.json").write_text(json.dumps(record))
    loaded = RunRecord.load(tmp_path)
    assert loaded.done == 3
    assert np.isnan(loaded.matrix()[1]).all()
    assert loaded.matrix()[2].tolist() == record["accuracy"]["accuracy"][2]


def test_scores_of_other_names_are_refused() -> None:
    record = RunRecord("a", "b", "c", {}, ["d", "e"], primary="p", zero_shot={"p": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"the same scores at every stage, got p and \['q'\]"):
        record.add_row([{"p": 1.0}, {"q": 1.0}])
    record.add_row([{"p": 1.0}, {"p": 1.0}])
    with pytest.raises(ValueError, match="the same scores at every stage, got q"):
        record.add_row([{"q": 1.0}, {"q": 1.0}])


def test_differences_are_listed_by_key() -> None:
    assert config_differences({"lr": 0.1, "a": 1, "old": 2}, {"lr": 0.2, "a": 1, "new": None}) == [
        "lr: 0.1 there, 0.2 here",
        "old: 2 there, 'unset' here",
    ]
    assert config_differences({"a": 1.0}, {"a": 1}) == []
    balanced = {"method": "balanced", "lr": 0.1}
    assert config_differences({**balanced, "energy": 0.97, "policy": "stop"}, balanced) == []  # of an older version
    assert config_differences({**balanced, "energy": 0.97}, {**balanced, "method": "gpm"})


def test_versions_are_those_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable installation keeps the metadata of the day it was made."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    versions = library_versions()
    assert versions["manifold-cl"] == manifold_cl.__version__
    assert versions["torch"] == "0.0.1"
