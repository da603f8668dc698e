"""Files in each other's places: of other tasks, other runs, other versions and other formats."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from file_kinds import FILE_KINDS, STOPPED, resumed, toy_run
from killed_jobs import OURS, run_state
from mutations import outcome
from toy import toy_stream

from manifold_cl import ContinualRunner
from manifold_cl.continual import Training, make_method
from manifold_cl.files import FileError

NAMES = ("adapter.safetensors", "memory.safetensors", "learned.json")
VERSION_1 = Path(__file__).parents[1] / "version_1" / "eblora" / "tasks"
Tally = Callable[..., None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("whole") / "folder"
    toy_run(folder)
    return dict(run_state(folder))


def goes_on_or_refuses(folder: Path, whole: dict[str, object]) -> str:
    try:
        found = resumed(folder)
    except FileError as error:
        problem = "" if str(folder) in str(error) else str(error)
    else:
        problem = ", ".join(key for key in whole.keys() | found.keys() if whole.get(key) != found.get(key))
        assert not problem
        return "equal"
    assert not problem
    return "refused"


@pytest.mark.reliability
@pytest.mark.parametrize("name", NAMES)
def test_files_of_two_tasks_in_each_others_place_are_not_taken(
    name: str, whole: dict[str, object], tmp_path: Path, tally: Tally
) -> None:
    STOPPED(tmp_path / "folder")
    one, other = (tmp_path / "folder" / "tasks" / task / name for task in ("01-first", "02-second"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    tally(f"mutations, {goes_on_or_refuses(tmp_path / 'folder', whole)}", "swapped between tasks")
    tally("mutations", "swapped between tasks")


@pytest.mark.reliability
@pytest.mark.parametrize("name", [*NAMES, "all"])
@pytest.mark.parametrize("task", ["01-first", "02-second"])
@pytest.mark.parametrize("origin", ["another seed", "version 1"])
def test_files_of_another_run_are_not_taken(
    name: str, task: str, origin: str, whole: dict[str, object], tmp_path: Path, tally: Tally
) -> None:
    STOPPED(tmp_path / "folder")
    if origin == "version 1":
        source = VERSION_1 / task
    else:
        method = make_method("eblora", **OURS)
        training = Training(epochs=1, seed=7)
        ContinualRunner(toy_stream(), method, tmp_path / "other", training=training).run()
        source = tmp_path / "other" / "tasks" / task
    for each in source.iterdir() if name == "all" else (source / name,):
        shutil.copy(each, tmp_path / "folder" / "tasks" / task)
    tally(f"mutations, {goes_on_or_refuses(tmp_path / 'folder', whole)}", f"of {origin}")
    tally("mutations", f"of {origin}")


@pytest.mark.reliability
@pytest.mark.parametrize("name", FILE_KINDS)
def test_a_file_of_another_format_is_refused(name: str, tmp_path: Path, tally: Tally) -> None:
    """Content of every other format in place of a file."""
    kind = FILE_KINDS[name]
    (tmp_path / "folder").mkdir()
    kind.write(tmp_path / "folder")
    path = tmp_path / "folder" / kind.file
    value = outcome(lambda: kind.read(tmp_path / "folder"), path)
    others = [other for other in FILE_KINDS.values() if other.family != kind.family]
    for number, other in enumerate(Random(name).sample(others, 4)):
        source = tmp_path / f"other{number}"
        source.mkdir()
        other.write(source)
        new = path.with_name("replacement")
        shutil.copy(source / other.file, new)
        os.replace(new, path)
        found = outcome(lambda: kind.read(tmp_path / "folder"), path)
        allowed = found in ("refused", value) or (kind.subset and found == "{}")
        assert allowed, other.file
        tally("mutations", "of another format")
        tally("mutations, refused" if found == "refused" else "mutations, equal", "of another format")
