"""A study of two methods on the toy stream."""

from collections.abc import Callable
from pathlib import Path

import pytest
from two_methods import CONFIG


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
