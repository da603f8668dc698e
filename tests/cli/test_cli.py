"""The command itself: its help, its version, ``info``, and paths that are not there."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from command import Call

from manifold_cl import METHODS, __version__
from manifold_cl.cli.run import QUICK

COMMANDS = (
    *("run", "plan", "study", "compare", "analyze", "retractions", "export", "info"),
    *("subspace", "subspace build", "subspace info", "subspace check"),
    *("streams", "streams check", "streams run", "streams presets", "streams layout"),
)


def test_info_lists_what_is_here(call: Call) -> None:
    shown = json.loads(call("info", "--json").out)
    assert set(shown) == {"version", "versions", "machine", "methods", "retractions", "streams", "cache"}
    assert shown["methods"].keys() == METHODS.keys()
    assert "memory" not in shown["methods"]["eblora"]
    assert shown["methods"]["zero_shot"] == {}
    for name, cls in METHODS.items():  # all that --set takes, options at which a record says nothing among them
        assert shown["methods"][name].keys() == {one.name for one in fields(cls) if one.init}
    assert shown["retractions"]["polar"] == {"euclidean": 2, "canonical": 1}
    release = torch.__version__.partition("+")[0]  # packages of the registry are named without the build
    assert shown["versions"]["torch"] in (torch.__version__, release)
    ended = call("info")
    assert ended.code == 0
    for word in ("method eblora", "retraction qr", "text-six", "rank=16", "no options", shown["version"]):
        assert word in " ".join(ended.out.split())


MISSING = [
    (("compare", "{}"), "give folders of runs or of studies"),
    (("analyze", "{}"), "give a run folder, or a folder or file with adapters"),
    (("analyze", ".", "--memory", "{}"), "give for --memory a folder with memory.safetensors"),
    (("analyze", ".", "--base", "{}"), "give for --base a checkpoint"),
    (("export", "{}"), "give adapter folders or run folders"),
    (("study", "{}"), "give the study's TOML file"),
    (("subspace", "info", "{}"), "give a folder with memory.safetensors"),
    (("subspace", "check", "{}"), "give a folder with memory.safetensors"),
    (("subspace", "build", "--out", "m", "--memory", "{}"), "give for --memory a folder with memory.safetensors"),
    (("subspace", "build", "--out", "m", "--adapters", "{}"), "give for --adapters a folder with an adapter"),
    (("streams", "check", "{}"), "give a folder; create it, and put the data of ucit there"),
    (("streams", "run", "{}"), "'manifold-cl streams check FOLDER' verifies"),
]


@pytest.mark.parametrize(("arguments", "needed"), MISSING, ids=[" ".join(arguments) for arguments, _ in MISSING])
def test_a_path_that_is_not_there_is_named_with_what_is_needed(
    arguments: tuple[str, ...], needed: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call(*(argument.format("nowhere") for argument in arguments))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: nowhere does not exist: ")
    assert needed in ended.err
    assert not list(tmp_path.iterdir())


def test_the_version_is_that_of_the_package(call: Call) -> None:
    ended = call("--version")
    assert (ended.code, ended.out.strip()) == (0, f"manifold-cl {__version__}")
    command = [sys.executable, "-m", "manifold_cl", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ended.out


def test_the_help_of_run_names_methods_defaults_an_example_and_the_time(call: Call) -> None:
    text = " ".join(call("run", "--help").out.split())
    assert all(name in text for name in METHODS)
    for words in ("sequential_merge and eblora", "default: text-six", "manifold-cl run --quick", "minutes on 2 CPU"):
        assert words in text
    assert all(name in text for pair in QUICK.items() for name in pair)


@pytest.mark.parametrize("command", ["", *(name for name in COMMANDS)])
def test_help_shows_no_type_for_flags(command: str, call: Call) -> None:
    shown = call(*command.split(), "--help").out
    assert "--help" in shown
    assert "bool" not in shown


LIBRARIES = {"torch", "numpy", "pandas", "matplotlib", "geoopt", "scipy", "safetensors", "transformers"}


@pytest.mark.slow
def test_help_loads_none_of_the_large_libraries() -> None:
    code = f"""
import contextlib, io, json, sys
from manifold_cl import cli
loaded = {{"import": [*sys.modules]}}
for command in {["", *COMMANDS]!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        cli.main([*command.split(), "--help"])
    assert "--help" in shown.getvalue(), command
    loaded[command] = [*sys.modules]
print(json.dumps(loaded))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {command: set(modules) for command, modules in json.loads(ended.stdout).items()}
    assert {"manifold_cl.cli", "typer"} <= loaded["import"]
    assert {command: modules & LIBRARIES for command, modules in loaded.items() if modules & LIBRARIES} == {}


def test_help_and_nothing_at_all_show_the_commands(call: Call) -> None:
    for arguments, code in ((("--help",), 0), ((), 2), (("run", "-h"), 0)):
        ended = call(*arguments)
        assert ended.code == code
        assert "--resume" in ended.out if "run" in arguments else "analyze" in ended.out + ended.err
    ended = call("rnu")
    assert ended.code == 2
    assert "No such command 'rnu'" in ended.err
