"""The examples of the API page run, and use every public name."""

import doctest
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blank_figures import figures
from safetensors.torch import save_file

import analysis

PAGE = Path(analysis.__file__).parents[1] / "docs" / "api" / "analysis.rst"
MATRIX = [[70.0, 41.0, 31.0], [65.0, 80.0, None], [60.0, 75.0, 90.0]]


@pytest.mark.slow
def test_the_examples_of_the_api_page_run(
    tmp_path: Path,
    write_run: Callable[..., Path],
    write_study: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/ours"))
    write_run(Path("runs/theirs"), seed=1, method="sequential_merge", name="theirs")
    write_study(Path("study"), {"eblora": [MATRIX, MATRIX], "sequential": [MATRIX, MATRIX]})
    save_file({"model.layer.0.query.weight": torch.zeros(12, 10)}, "base.safetensors")
    with figures(drawn=False):  # test_figures.py draws every one
        result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 40
    assert result.failed == 0


def test_every_public_name_is_in_an_example() -> None:
    assert len(analysis.__all__) <= 60
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(PAGE.read_text(encoding="utf-8")))
    assert {name for name in analysis.__all__ if name not in code} == set()
