"""Messages and help name no option that no command has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import typer

import analysis
import manifold_cl
from manifold_cl.cli import app

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
