"""A study of two methods on the toy stream."""

from collections.abc import Callable
from pathlib import Path

import pytest
import toy

CONFIG = f"""
name = "toy"
stream = "{Path(toy.__file__)}:toy_stream"
rank = 4
seeds = [0, 1]
processes = 2

[training]
epochs = 2

[methods.sequential_merge]
alpha = 8.0
lr = 0.03

[methods.ours]
method = "eblora"
alpha = 8.0
lr = 0.03
scale_lr = 0.1
energy = 0.9
statistic_examples = 96
"""


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
