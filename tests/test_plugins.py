"""Registries of retractions, methods and streams: one habit, and what installed packages offer."""

import sys

import pytest

from manifold_cl import METHODS, RETRACTIONS, Method, plugins, register_method, register_retraction
from manifold_cl.infeasible import INFEASIBLE_STEPS, register_infeasible_step
from manifold_cl.plugins import Registry
from manifold_cl.streams import STREAMS, register_stream

REGISTRIES = [
    (RETRACTIONS, "polar", lambda: register_retraction(type(RETRACTIONS["polar"]))),
    (INFEASIBLE_STEPS, "landing", lambda: register_infeasible_step(type(INFEASIBLE_STEPS["landing"]))),
    (METHODS, "eblora", lambda: register_method(METHODS["eblora"])),
    (STREAMS, "text-six", lambda: register_stream(STREAMS["text-six"])),
]
IDS = ["retractions", "infeasible_steps", "methods", "streams"]


class Entry:
    """An entry point as importlib.metadata returns it."""

    dist = None

    def __init__(self, name, load):
        self.name, self.load = name, load


def offer(monkeypatch, group, *entries):
    def entry_points(*, group: str, name: str | None = None):
        return [e for e in entries if group == wanted and name in (None, e.name)]

    wanted = group
    monkeypatch.setattr(plugins, "entry_points", entry_points)


@pytest.mark.parametrize(("registry", "name", "again"), REGISTRIES, ids=IDS)
def test_every_registry_is_read_only_and_names_what_is_near(registry, name, again):
    assert name in registry
    assert len(registry) == len(list(registry)) > 2
    assert name in repr(registry)
    with pytest.raises(TypeError):
        registry[name] = None
    with pytest.raises(ValueError, match=rf"unknown {registry.kind} '{name}x', did you mean {name}.*\(have: "):
        registry[name + "x"]
    assert registry.get(name + "x") is None
    with pytest.raises(ValueError, match=f"'{name}' is registered already"):
        again()


@pytest.mark.parametrize(
    "register", [register_retraction, register_infeasible_step, register_method, register_stream], ids=IDS
)
def test_what_is_no_such_entry_is_refused(register):
    with pytest.raises(TypeError, match=r"needs name|subclass of Method"):
        register(int)


@pytest.fixture
def registry():
    registry = Registry("colour", lambda candidate: (candidate.lower(), candidate))
    registry.register("RED")
    return registry


def test_entry_points_are_listed_at_once_and_loaded_when_used(registry, monkeypatch):
    loaded = []
    offer(monkeypatch, "manifold_cl.colours", Entry("blue", lambda: loaded.append("blue") or "BLUE"))
    assert list(registry) == ["red", "blue"]
    assert registry["red"] == "RED"
    assert loaded == []
    assert registry["blue"] == registry["blue"] == "BLUE"
    assert loaded == ["blue"]


def test_an_entry_point_whose_module_registers_itself_is_registered_once(registry, monkeypatch):
    def load():
        registry.register("BLUE")
        return "BLUE"

    offer(monkeypatch, "manifold_cl.colours", Entry("blue", load))
    assert registry["blue"] == "BLUE"


@pytest.mark.parametrize(
    ("load", "message"), [(lambda: 1 / 0, "division by zero"), (lambda: "GREEN", "has another name")]
)
def test_a_broken_entry_point_breaks_its_own_entry_only(registry, monkeypatch, load, message):
    offer(monkeypatch, "manifold_cl.colours", Entry("blue", load))
    with pytest.raises(ValueError, match=f"the colour 'blue' of an unknown package cannot be loaded: .*{message}"):
        registry["blue"]
    assert registry["red"] == "RED"


def test_a_third_party_method_is_found(monkeypatch):
    class Theirs(METHODS["sequential"]):
        name = "theirs"

    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    offer(monkeypatch, "manifold_cl.methods", Entry("theirs", lambda: Theirs))
    assert "theirs" in METHODS
    assert issubclass(METHODS["theirs"], Method)


def test_a_name_that_a_file_lacks_is_refused_with_those_that_it_has(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from json import loads\n\n\ndef my_stream(): ...\n")
    with pytest.raises(
        ValueError, match=r"mine\.py: unknown name 'my_steam', did you mean my_stream\? \(have: my_stream\)"
    ):
        plugins.load_object(f"{file}:my_steam")


def test_a_file_that_fails_leaves_the_module_that_was_read_before(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def my_stream(): return 1\n")
    assert plugins.load_object(f"{file}:my_stream")() == 1
    read = sys.modules["manifold_cl_plugin_mine"]
    file.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        plugins.load_object(f"{file}:my_stream")
    assert sys.modules["manifold_cl_plugin_mine"] is read
    other = tmp_path / "other.py"
    other.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        plugins.load_object(f"{other}:my_stream")
    assert "manifold_cl_plugin_other" not in sys.modules


def test_a_file_as_a_stream_needs_the_name_of_its_function():
    with pytest.raises(ValueError, match=r"'mine\.py': a stream in a file is mine\.py:FUNCTION"):
        STREAMS["mine.py"]
