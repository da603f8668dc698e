"""A study of two methods on the toy stream."""

from collections.abc import Callable
from pathlib import Path

import pytest
from two_methods import CONFIG

from manifold_cl.study import read_plan
from manifold_cl.study.worker import run_cell


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Writes the study's file, with some of its text replaced."""

    def write(*changes: tuple[str, str], more: str = "") -> Path:
        text = CONFIG
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "study.toml"
        path.write_text(text + more, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's folder after an undisturbed call, all cells in this process; not to be written to."""
    folder: Path = tmp_path_factory.mktemp("straight")
    (folder / "study.toml").write_text(CONFIG)
    plan = read_plan(folder / "study.toml")
    plan.save(folder)
    for cell in plan.cells:
        run_cell(plan, cell, folder)
    return folder
