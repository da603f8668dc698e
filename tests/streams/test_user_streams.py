"""A stream from the user's own file: by a function with or without the parameters tasks and examples."""

from pathlib import Path

import pytest

from manifold_cl.streams.user_streams import open_named

FILE = """
from toy import toy_stream

SIZE = 3

def bare():
    return toy_stream()

def full(tasks=None, examples=None):
    return toy_stream(tasks=tasks, examples=examples)

def anything(**selection):
    return toy_stream(**selection)

def nothing():
    return None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize("function", ["bare", "full", "anything"])
def test_tasks_are_chosen_whether_or_not_the_function_takes_them(function: str, folder: Path) -> None:
    name = f"mine.py:{function}"
    assert open_named(name, code_folder=folder).task_names == ("first", "second", "third")
    chosen = open_named(name, ["third", "first"], code_folder=folder)
    assert chosen.task_names == ("third", "first")


@pytest.mark.parametrize("function", ["full", "anything"])
def test_examples_reach_a_function_that_takes_them(function: str, folder: Path) -> None:
    stream = open_named(f"mine.py:{function}", examples=8, code_folder=folder)
    assert [task.size("train") for task in stream.tasks] == [8, 8, 8]


@pytest.mark.parametrize(
    ("function", "selection", "error", "message"),
    [
        ("bare", {"examples": 8}, ValueError, "no parameter examples, got examples=8"),
        ("bare", {"tasks": ["frist"]}, ValueError, "unknown task 'frist', did you mean first"),
        ("nothing", {}, TypeError, "returned a NoneType: a TaskStream"),
        ("SIZE", {}, TypeError, "is a int: a function"),
        ("absent", {}, ValueError, "unknown name 'absent'"),
    ],
)
def test_what_is_no_stream_is_refused_by_name(
    function: str, selection: dict[str, object], error: type[Exception], message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        open_named(f"mine.py:{function}", **selection, code_folder=folder)


def test_names_of_the_registry_need_no_folder_and_code_does() -> None:
    with pytest.raises(ValueError, match="unknown stream 'toyy'"):
        open_named("toyy", code_folder=None)
    with pytest.raises(ValueError, match="is code, which runs only on request"):
        open_named("mine.py:bare", code_folder=None)
