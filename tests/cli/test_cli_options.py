"""Messages and help name no option that no command has."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from torch import nn

import analysis
import manifold_cl
from manifold_cl import inject_adapters, save_adapters
from manifold_cl.adapters import LoRALinear
from manifold_cl.cli import app
from manifold_cl.cli.search import update_measures
from tests.cli.command import Call

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHERS = {"archives.py", "hub.py", "ray_engine.py"}
"""Files whose options are those of other programs: pip, hf and ray."""


def options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for inner in getattr(command, "commands", {}).values():
        yield from options(inner)


def test_every_option_in_a_message_exists() -> None:
    known = {*options(typer.main.get_command(app)), "--help"}
    assert len(known) > 40
    folders = [Path(str(package.__file__)).parent for package in (manifold_cl, analysis)]
    named = {
        (path.name, option)
        for folder in folders
        for path in folder.rglob("*.py")
        if path.name not in OTHERS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for option in OPTION.findall(node.value)
    }
    assert ("run.py", "--quick") in named
    assert sorted((file, option) for file, option in named if option not in known) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "--out", ""), "--out"),
        (("run", "--out="), "--out"),
        (("run", "--tasks", " "), "--tasks"),
        (("analyze", ""), "argument 1"),
        (("analyze", "mend", "somewhere", ""), "argument 2"),
        (("subspace", "build", "--out", ""), "--out"),
    ],
)
def test_empty_values_are_refused(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(tmp_path)  # an empty path would be this folder
    ended = call(*arguments)
    assert ended.code == 2
    assert f"{named} is empty" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("run",), "--examples"),
        (("streams", "run", "."), "--examples"),
        (("streams", "run", "."), "--test-examples"),
        (("streams", "run", "."), "--max-length"),
        (("streams", "run", "."), "--max-new-tokens"),
        (("streams", "run", "."), "--batch-size"),
        (("subspace", "build", "--out", "x"), "--examples"),
        (("subspace", "build", "--out", "x"), "--size"),
        (("subspace", "check", "x"), "--rank"),
    ],
)
def test_counts_below_one_are_refused(call: Call, command: tuple[str, ...], option: str) -> None:
    for count in (0, -3):
        ended = call(*command, option, count)
        assert ended.code == 2
        assert f"'{option}'" in ended.err
        assert f"at least 1, got {count}" in ended.err


@pytest.mark.parametrize("command", [("run",), ("retractions",), ("analyze", "."), ("analyze", "merge", ".", ".")])
def test_the_device_without_numbers_is_refused(call: Call, command: tuple[str, ...]) -> None:
    ended = call(*command, "--device", "meta")
    assert ended.code == 2
    assert "device 'meta' holds no numbers" in ended.err


def test_the_statistics_that_torch_logs_at_exit_are_not_shown(call: Call, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)  # of the root, as basicConfig does where pytest is not
    assert call("--version").code == 0
    assert not logging.getLogger("torch._subclasses.fake_tensor").isEnabledFor(logging.INFO)
    assert logging.getLogger("manifold_cl").isEnabledFor(logging.INFO)


def test_an_empty_name_in_a_list_is_refused(call: Call, tmp_path: Path) -> None:
    for text in ("one,", ",one", "one,,two"):
        ended = call("analyze", "report", tmp_path, "--tasks", text)
        assert ended.code == 2
        assert f"a name in the list '{text}' is empty" in ended.err


def test_a_trial_whose_updates_are_all_zero_has_no_measures(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    inject_adapters(model, ["0"], lambda _, layer: LoRALinear(layer, 2))
    save_adapters(model, tmp_path / "zero")
    assert update_measures(tmp_path / "zero", "sequential_merge") == {}
