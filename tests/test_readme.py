"""The README's code runs as it is printed, and names only commands that exist."""

import re
from pathlib import Path

import pytest
import torch

from manifold_cl import EBLoRALinear, cli, inject_adapters, save_adapters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_training_example_keeps_the_constraint_and_leaves_plain_layers():
    space: dict[str, object] = {}
    exec(BLOCKS[0], space)
    assert max(space["optimizer"].constraint_error()) < 2e-6  # float32 rounding, the promise in its comment
    assert [type(layer).__name__ for layer in space["model"]] == ["Linear", "Tanh", "Linear"]


def test_the_analysis_example_reads_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "runs" / "text-six-eblora-seed0"
    for task in range(2):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        inject_adapters(model, ["0"], lambda name, linear: EBLoRALinear(linear, rank=2, initial_scale=1.0))
        save_adapters(model, folder / f"task-{task}")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    exec(BLOCKS[1], space)
    assert len(space["adapters"].tasks) == 2


def test_its_rows_are_those_that_compare_prints(capsys: pytest.CaptureFixture[str]):
    cli.main(["compare", str(ROOT / "benchmarks/results/text-six"), "--markdown"])
    full = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line]
    names = full[0]
    rows = {row[1]: dict(zip(names, row, strict=True)) for row in full[2:]}
    shown = [[cell.strip() for cell in line.split("|")] for line in README.splitlines() if line.startswith("| `")]
    assert len(shown) == 5
    for _, name, *figures, _ in shown:
        row = rows[name.split(" (")[0]]
        assert figures[:2] == [row["MFN"], row["MFT"]]
        assert figures[3] == row["minutes"]
        assert figures[2] in (row["BWT"], "–")


def test_every_make_target_it_names_exists():
    named = set(re.findall(r"make (\w+)", README))
    assert {"run", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))


def test_every_file_it_links_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
