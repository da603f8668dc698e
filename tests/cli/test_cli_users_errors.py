"""Errors from a user's own file say where in it they arose."""

import traceback
from pathlib import Path

import pytest
from command import Call

from manifold_cl.cli.places import of_users, place_of, trace_of

BROKEN = """
from manifold_cl import TaskStream

def kind(tasks=None, **_):
    return tasks[0]

def empty(**_):
    return TaskStream(name="x", tasks=[], make_model=print, targets=[])

def missing(**_):
    return {}["tasks"]
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kind", "'NoneType' object is not subscriptable (own.py, line 5, in kind)"),
        ("empty", "has no tasks: give at least one (own.py, line 8, in empty)"),
    ],
)
def test_an_error_names_the_line_of_the_users_file(name: str, said: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BROKEN)
    ended = call("run", "--stream", f"{tmp_path}/own.py:{name}", "--out", tmp_path / "runs")
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_an_unexpected_error_is_traced_from_the_users_file_on(call: Call, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BROKEN)
    ended = call("run", "--stream", f"{tmp_path}/own.py:missing", "--out", tmp_path / "runs")
    assert ended.code == 1
    assert "KeyError: 'tasks'" in ended.err
    assert 'own.py", line 11, in missing' in ended.err
    assert "typer" not in ended.err


def test_errors_of_the_library_alone_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing") as caught:
        (tmp_path / "missing").read_text()
    assert of_users(caught.value)[0].name == "test_errors_of_the_library_alone_have_no_place"
    assert caught.tb.tb_next is not None
    library = caught.value.with_traceback(caught.tb.tb_next)
    assert of_users(library) == []
    assert place_of(library) == ""
    assert trace_of(library) == "".join(traceback.format_exception(library))
