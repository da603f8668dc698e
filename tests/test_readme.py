"""The README's code runs as it is printed, and names only commands that exist."""

import re
from pathlib import Path

import pytest

from manifold_cl import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_training_and_geometry_examples_run_in_order():
    space: dict[str, object] = {}
    exec(BLOCKS[0], space)
    exec(BLOCKS[1], space)
    assert space["check_retraction"]("polar").failures() == ()
    assert max(space["manifold"].constraint_error(space["point"])) < 2e-6
    assert not any("Adapter" in type(m).__name__ or "LoRA" in type(m).__name__ for m in space["model"].modules())


def test_its_table_is_the_one_that_compare_prints(capsys: pytest.CaptureFixture[str]):
    cli.main(["compare", str(ROOT / "benchmarks/results/text-six"), "--markdown"])
    table = capsys.readouterr().out
    assert "| `eblora` |" in table
    assert table in README


def test_every_make_target_it_names_exists():
    named = set(re.findall(r"make (\w+)", README))
    assert {"run", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))


def test_every_file_it_links_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
