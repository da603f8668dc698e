"""Garbage collection while a command runs."""

import atexit
import gc
import inspect

import pytest

from manifold_cl.cli import garbage
from manifold_cl.cli.analyze import commands
from manifold_cl.cli.garbage import RARELY, collecting_rarely


def test_a_decorated_command_collects_rarely_and_leaves_the_numbers_as_they_were() -> None:
    before = gc.get_threshold()
    assert collecting_rarely(gc.get_threshold)() == (RARELY, *before[1:])
    with pytest.raises(ZeroDivisionError):
        collecting_rarely(lambda: 1 / 0)()
    assert gc.get_threshold() == before


def test_all_commands_of_analyze_collect_rarely() -> None:
    code = collecting_rarely(gc.get_threshold).__code__  # type: ignore[attr-defined]
    for command in commands.registered_commands:
        function = inspect.unwrap(command.callback, stop=lambda each: each.__code__ is code)
        assert function.__code__ is code, command.name


def test_objects_are_left_out_of_the_collections_at_exit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    garbage._freeze_at_exit.cache_clear()
    command = collecting_rarely(len)
    assert [command("a"), command("ab")] == [1, 2]
    assert registered == [gc.freeze]
