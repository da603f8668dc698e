"""Every ``pip install`` that the code or the docs print works: the package has no index, its extras do not resolve."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
REQUIREMENTS = {each for group in (PROJECT["dependencies"], *EXTRAS.values()) for each in group}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted(path for folder in ("manifold_cl", "analysis") for path in (ROOT / folder).rglob("*.py"))


def commands(path: Path) -> list[str]:
    """What follows ``pip install`` on each line."""
    return re.findall(r"pip install ([^\n]*)", path.read_text(encoding="utf-8"))


def test_there_are_commands_to_test():
    assert sum(len(commands(path)) for path in SOURCES) >= 6
    assert sum(len(commands(path)) for path in PAGES) >= 4


@pytest.mark.parametrize("paths", [PAGES, SOURCES], ids=["pages", "sources"])
def test_requirements_and_extras_are_those_of_the_project(paths: list[Path]):
    for path in paths:
        for command in commands(path):
            for quoted in re.findall(r"'([^' ]+)'", command):
                if extras := re.fullmatch(r"\.\[([\w,]+)\]", quoted):
                    assert set(extras[1].split(",")) <= set(EXTRAS), (path, command)
                elif "{" not in quoted:
                    assert quoted in REQUIREMENTS, (path, command)
            assert "manifold-cl" not in command, f"{path}: no index has this package, install from a clone"
