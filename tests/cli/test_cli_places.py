"""Places that cannot be read or written: each command says what was given, what is needed and what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy
from command import Call

from manifold_cl import ProtectedSubspace, SubspaceMemory
from manifold_cl.continual.subspaces import memory_files

LIST: dict[str, Any] = {
    "method": "sequential_merge",
    "stream": f"{Path(toy.__file__)}:toy_stream",
    "seed": 5,
    "trials": [{"rank": 2, "lr": 0.03}],
}
STUDY = f"""
stream = "{Path(toy.__file__)}:toy_stream"
rank = 4
seeds = [0]

[methods.zero_shot]
"""
WRITING: dict[str, tuple[str, ...]] = {
    "run": ("run", "--quick", "--out", "{out}"),
    "study": ("study", "{study}", "--out", "{out}"),
    "search": ("search", "{list}", "--out", "{out}"),
    "lab": ("lab", "--out", "{out}"),
    "retractions": ("retractions", "--plot", "{out}/lab.svg"),
    "export": ("export", "{folder}", "--out", "{out}"),
    "subspace build": ("subspace", "build", "--out", "{out}"),
    "streams run": ("streams", "run", "{folder}", "--out", "{out}"),
    "analyze report": ("analyze", "report", "{folder}", "--out", "{out}"),
    "analyze many": ("analyze", "many", "{folder}", "--out", "{out}"),
    "analyze merge": ("analyze", "merge", "{folder}", "--out", "{out}"),
    "analyze suggest": ("analyze", "suggest", "{folder}", "--out", "{out}"),
    "analyze mend": ("analyze", "mend", "{folder}", "--apply", "truncate=2", "--out", "{out}"),
}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Path]:
    paths = {"folder": tmp_path / "folder", "study": tmp_path / "a.toml", "list": tmp_path / "a.json"}
    paths["folder"].mkdir()
    paths["study"].write_text(STUDY)
    paths["list"].write_text(json.dumps(LIST))
    return paths


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that refuses files of root too")
@pytest.mark.parametrize("command", WRITING)
def test_a_place_that_cannot_be_written_is_named_before_the_work(
    command: str, call: Call, given: dict[str, Path]
) -> None:
    for out in ("/proc/x/y", "/proc"):
        code, _, err = call(*(word.format(out=out, **given) for word in WRITING[command]))
        assert code == 2
        option = "--plot" if command == "retractions" else "--out"
        where = "it" if out == "/proc" else "/proc"
        assert f"error: {option} is {out}, but no file can be written in {where} (" in err
        assert "choose a folder that you may write to" in err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that refuses files of root too")
@pytest.mark.parametrize("command", ["study", "search"])
def test_a_dry_run_needs_no_place_to_write(command: str, call: Call, given: dict[str, Path]) -> None:
    words = (word.format(out="/proc/x", **given) for word in WRITING[command])
    assert call(*words, "--dry-run").code == 0


def test_a_proof_that_files_can_be_written_leaves_nothing(call: Call, given: dict[str, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert call("export", given["folder"], "--out", tmp_path / "new" / "lora").code == 2  # it holds no adapter
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_place_of_a_list_names_the_lists_in_it(call: Call, given: dict[str, Path], tmp_path: Path) -> None:
    code, _, err = call("search", given["folder"])
    assert code == 2
    assert f"{given['folder']} is a folder: give lists of trials, JSON files, and this folder holds none" in err
    code, _, err = call("search", tmp_path)
    assert code == 2
    assert f"{tmp_path} is a folder: give lists of trials, JSON files, such as {given['list']}" in err


@pytest.mark.parametrize("command", ["info", "check"])
def test_what_is_no_memory_is_named_with_what_to_give(command: str, call: Call, tmp_path: Path) -> None:
    def said(path: Path) -> str:
        ended = call("subspace", command, path)
        assert ended.code == 2
        return ended.err

    wrote = "give the folder that SubspaceMemory.save or 'manifold-cl subspace build' wrote"
    empty, task = tmp_path / "empty", tmp_path / "run" / "tasks" / "01-first"
    empty.mkdir()
    task.mkdir(parents=True)
    assert f"error: {empty}/memory.safetensors does not exist: {wrote}" in said(empty)
    file = tmp_path / "notes.txt"
    file.write_text("x")
    assert f"error: {file} is a file, and protected subspaces are a folder with memory.safetensors: {wrote}" in said(
        file
    )
    (empty / "adapter_config.json").write_text("{}")
    assert f"error: {empty} holds an adapter and {empty}/memory.safetensors does not exist: {wrote}" in said(empty)
    SubspaceMemory({"a": ProtectedSubspace.empty(4)}).save(task)
    assert f"is a file: give its folder, {task}" in said(task / memory_files.MEMORY)
    (tmp_path / "run" / "record.json").write_text("{}")
    advice = (
        f"holds a run and {tmp_path}/run/memory.safetensors does not exist: give a folder that has one, such as {task}"
    )
    assert advice in said(tmp_path / "run")


def test_compare_names_a_file_and_the_runs_inside_a_folder(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("x")
    assert f"error: {file} is a file: give the folder of a run or of a study" in call("compare", file).err
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text("{}")
    err = call("compare", tmp_path).err
    runs = ", ".join(str(tmp_path / name) for name in "abc")
    assert f"nor a study.json (a study): give the folders in it, {runs} and 1 more" in err
