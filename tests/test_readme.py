"""The README's code runs as it is printed, its numbers are those of the files, and the home page has the same text."""

import re
from pathlib import Path

import pytest
import torch

from manifold_cl import METHODS, EBLoRALinear, cli, inject_adapters, save_adapters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = (ROOT / "docs/index.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PRINTED = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
LABELS_ONLY = {"eblora-official", "stella-diagonal", "stella-full"}  # labels of the study, not names of methods


def scores_in(text: str) -> dict[str, list[float]]:
    """Setting → percent of the first and of the second task, in what the example prints."""
    lines = re.findall(r"protect=(\w+): first task (\d+)%, second task (\d+)%", text)
    return {setting: [float(first), float(second)] for setting, first, second in lines}


def run_example() -> tuple[dict[str, object], str]:
    """The names that the first block leaves, and what it prints."""
    printed: list[str] = []
    space: dict[str, object] = {"print": printed.append}
    with torch.random.fork_rng():
        exec(BLOCKS[0], space)
    return space, "\n".join(printed)


def test_the_two_task_example_is_short_and_uses_no_hooks():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 25
    assert "hook" not in BLOCKS[0]


def test_the_two_task_example_keeps_the_first_task_only_with_protection():
    space, printed = run_example()
    measured, shown = scores_in(printed), scores_in(PRINTED[0])
    assert measured.keys() == shown.keys() == {"False", "True"}
    lost, kept = measured["False"][0], measured["True"][0]
    assert kept > 85  # of 100; five classes, chance is 20
    assert kept - lost > 20  # points of the first task that only protection keeps
    assert measured["True"][1] > 80  # the second task is learned all the same
    for setting, scores in shown.items():
        # 200 test examples: another order of float32 sums moves a few of them
        assert measured[setting] == pytest.approx(scores, abs=5)
    assert max(space["optimizer"].constraint_error()) < 2e-6  # float32 rounding, the promise of docs/geometry.md
    assert [type(layer).__name__ for layer in space["model"]] == ["Linear", "Tanh", "Linear"]
    protected = space["memory"]
    for name, layer in space["layers"].items():
        assert 0 < protected[name].k <= layer.in_features - 4  # room for the next adapter of rank 4


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


@pytest.fixture
def full(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """Label → column → cell, as `manifold-cl compare` prints the study."""
    cli.main(["compare", str(ROOT / "benchmarks/results/text-six"), "--markdown"])
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line]
    return {row[1].strip("`"): dict(zip(lines[0], row, strict=True)) for row in lines[2:]}


def test_its_rows_are_those_that_compare_prints(full: dict[str, dict[str, str]]):
    lines = [line for line in README.splitlines() if re.match(r"\| \[?`", line)]
    assert len(lines) == 5
    for line in lines:
        _, name, mfn, mft, bwt, minutes, _ = (cell.strip() for cell in line.split("|"))
        label = re.search(r"`([\w-]+)`", name)[1]
        row = full[label]
        assert (mfn, mft, minutes) == (row["MFN"], row["MFT"], row["minutes"])
        assert bwt == row["BWT"] or (bwt == "–" and label in ("joint", "zero_shot"))
        assert label in METHODS  # so that it works as --method, as the README states


def test_labels_that_are_no_methods_are_told_apart(full: dict[str, dict[str, str]]):
    assert {label for label in full if label not in METHODS} == LABELS_ONLY
    assert "`stella-diagonal` for `stella_merge`" in README
    assert "stella_merge" in METHODS


def test_the_points_lost_per_task_are_those_of_the_records(capsys: pytest.CaptureFixture[str]):
    lost, gained = re.search(
        r"([\d.]+) percentage points below .*? ends ([\d.]+) points? above", README, re.DOTALL
    ).groups()
    cells = ROOT / "benchmarks/results/text-six/cells"
    cli.main(["compare", *(str(cells / f"{label}-seed0") for label in ("sequential_merge", "eblora")), "--json"])
    changes = re.findall(r'"bwt": (-?[\d.]+)', capsys.readouterr().out)
    assert [round(float(each), 1) for each in changes] == [-float(lost), float(gained)]


def test_every_make_target_it_names_exists():
    named = set(re.findall(r"make (\w+)", README))
    assert {"run", "quick", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))


def test_every_file_it_links_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", README) + re.findall(r'\bsrc(?:set)?="([^"]+)"', README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_home_page_of_the_site_has_the_same_text():
    """One text for both: only the links of the home page start from docs/ instead of the root."""
    text, _, menu = HOME.partition("<!-- {toctree}")
    from_docs = re.sub(r"""(\]\(|src(?:set)?=")docs/""", r"\1", README)
    expected = re.sub(r"\]\((CONTRIBUTING\.md|CITATION\.cff)\)", r"](../\1)", from_docs)
    assert text.strip() == expected.strip()
    assert menu
